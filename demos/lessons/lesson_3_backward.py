import marimo

app = marimo.App(app_title="3. The backward pass of BatchNorm / 배치 정규화의 역전파", css_file="lessons.css")

with app.setup:
    import marimo as mo
    import numpy as np
    from common import Say, editor, expects, language_switch, picture, table

    from demos import bn_backward
    from tinygrad_bn import Tensor, composed, grad, nn, testing, viz
    from tinygrad_bn import functional as F

    # In symbols, for readers of both languages.
    STEPS = bn_backward.STEPS | {
        "mu": ("Σ x / N", "∂mu = −Σ ∂xmu"),
        "sq": ("xmu²", "∂sq = ∂var / N"),
        "var": ("Σ sq / N", "∂var = ∂sqrtvar / (2 sqrtvar)"),
        "out": ("gammax + bias", "∂out = g"),
    }
    EPS = 1e-5
    RNG = np.random.default_rng(0)
    BATCH, COTANGENT = RNG.normal(3, 2, (5, 2)).round(1), RNG.normal(size=(5, 2)).round(1)
    WEIGHT, BIAS = np.array([1.5, -0.5]), np.array([0.1, 0.2])
    SAMPLES = ("", "1", "2", "3", "4", "5")


@app.cell
def _():
    # All controls are made here, so that they keep their values when the language changes.
    language = language_switch()
    x_11 = mo.ui.slider(-4, 10, 0.1, value=float(BATCH[0, 0]), label="x₁₁", show_value=True)
    one = editor("# dxhat, xmu: shape (5, 2); sqrtvar, ivar: shape (1, 2)\ndvar = np.zeros((1, 2))")
    two = editor("# dxhat, xhat: shape (5, 2); ivar: shape (1, 2)\nN = len(xhat)\ndx = ivar * dxhat")
    language
    return language, one, two, x_11


@app.cell
def _(language):
    say = Say(language)
    say(
        r"""
        # 3. The backward pass of BatchNorm

        Five samples, two channels. You move one input, and see every number of the forward and backward pass follow. At the end
        you have derived the gradient of BatchNorm, and know why it looks as it does. It takes about 15 minutes.
        """,
        r"""
        # 3. 배치 정규화의 역전파

        샘플 다섯 개, 채널 두 개입니다. 입력 하나를 움직이면 순전파와 역전파의 모든 수가 따라 움직입니다. 끝까지 따라오면 배치
        정규화의 그래디언트를 직접 유도하고, 왜 그런 모양인지도 알게 됩니다. 15분쯤 걸립니다.
        """,
    )
    return (say,)


@app.cell
def _(say, x_11):
    say(
        r"""
        ## Move one input

        The slider is sample 1 of channel 1. The cotangent g, the gradient that arrives from the loss, stays as it is.

        [[x_11]]
        """,
        r"""
        ## 입력 하나를 움직여 보기

        슬라이더는 채널 1의 샘플 1입니다. 손실에서 들어오는 그래디언트, 곧 코탄젠트 g는 그대로 둡니다.

        [[x_11]]
        """,
        x_11=x_11,
    )
    return


@app.cell
def _(x_11):
    data = BATCH.copy()
    data[0, 0] = x_11.value
    x, weight, bias = (Tensor(v, requires_grad=True) for v in (data, WEIGHT, BIAS))
    steps = F.batch_norm_steps(x, weight, bias, eps=EPS)
    for step in steps:
        step.retain_grad()
    steps.out.backward(COTANGENT)
    value = {name: t.numpy() for name, t in steps._asdict().items()} | {"x": data}
    gradient = {name: t.grad.numpy() for name, t in steps._asdict().items()} | {"x": x.grad.numpy()}
    return data, gradient, value


@app.cell
def _(gradient, say, value):
    mo.vstack([
        table({"x": value["x"][:, 0], "x̂": value["xhat"][:, 0], "g": COTANGENT[:, 0], "∂x": gradient["x"][:, 0]},
              head=SAMPLES),
        say(
            r"""
            You changed one input, and all five gradients of the channel moved: through μ and σ² each sample acts on all the
            others. The other channel did not move. The sum of ∂x over the batch is [[total]], wherever the slider stands. Now push
            $x_{11}$ far out: it takes the whole variance for itself, and the gradients of the channel shrink.
            """,
            r"""
            입력 하나를 바꾸었는데 이 채널의 그래디언트 다섯 개가 모두 움직였습니다. 샘플 하나하나가 μ와 σ²를 거쳐 다른 모든 샘플에
            영향을 주기 때문입니다. 다른 채널은 그대로입니다. 슬라이더가 어디에 있든 배치 전체의 ∂x의 합은 [[total]]입니다. 이제
            $x_{11}$을 멀리 보내 보세요. 그 값이 분산을 혼자 다 차지해서 채널의 그래디언트가 모두 작아집니다.
            """,
            total=np.round(gradient["x"][:, 0].sum(), 12) + 0.0,
        ),
    ])  # fmt: skip
    return


@app.cell
def _(gradient, say, value):
    def first(name):
        return np.broadcast_to(value[name], (5, 2))[0, 0], np.broadcast_to(gradient[name], (5, 2))[0, 0]

    mo.vstack([
        say(
            r"""
            ## The nine steps

            Here are the steps with value and gradient for sample 1 of channel 1. Read values downwards and gradients upwards. Each
            gradient is one local derivative times what arrives from below. In `sq` you see **why there is 1/N**: the variance is
            the mean of `sq`, so each sample gets an N-th of ∂var.
            """,
            r"""
            ## 아홉 단계

            채널 1, 샘플 1의 단계별 값과 그래디언트입니다. 값은 위에서 아래로, 그래디언트는 아래에서 위로 읽습니다. 그래디언트는 저마다 그
            단계의 미분에 아래에서 올라온 그래디언트를 곱한 것입니다. **왜 1/N이 나오는지**는 `sq`에서 볼 수 있습니다. 분산은 `sq`의
            평균이므로 샘플마다 ∂var의 N분의 1을 받습니다.
            """,
        ),
        table(
            {name: (formula, *(f"{number:.4f}".replace("-", "−") for number in first(name)), rule)
             for name, (formula, rule) in STEPS.items()},
            head=("", say.pick("step", "단계"), say.pick("value", "값"), "∂", say.pick("gradient", "그래디언트")),
        ),
    ])  # fmt: skip
    return


@app.cell
def _(data):
    # Each path gets a copy of x of its own, so the engine's gradient of a copy is the share of that path.
    direct, by_var, by_mean, by_mean_in_var = copies = [Tensor(data, requires_grad=True) for _ in range(4)]

    def batch_mean(t):
        return F.mean(t, axis=0, keepdims=True)

    deviation = by_var - batch_mean(by_mean_in_var)
    ivar = 1 / F.sqrt(batch_mean(deviation * deviation) + EPS)
    out = (direct - batch_mean(by_mean)) * ivar * WEIGHT + BIAS
    out.backward(COTANGENT)
    names = (
        "x → xmu → xhat → out",
        "x → xmu → sq → var → … → out",
        "x → mu → xmu → xhat → out",
        "x → mu → xmu → sq → … → out",
    )
    shares = {name: copy.grad.numpy() for name, copy in zip(names, copies, strict=True)}
    return (shares,)


@app.cell
def _(gradient, say, shares):
    total = np.sum(list(shares.values()), axis=0)
    figure, ((axes,),) = viz.subplots(1, 1, 7, 3.4)
    for i, (name, share) in enumerate(list(shares.items())[:3]):
        axes.bar(np.arange(1, 6) + 0.2 * (i - 1.5), share[:, 0], 0.2, color=viz.COLOURS[i], label=name)
    axes.bar(np.arange(1, 6) + 0.3, total[:, 0], 0.2, color="0.3", label="∂x")
    axes.axhline(0, color="0.3", linewidth=1)
    axes.set(xlabel="sample", ylabel="gradient")
    axes.legend(frameon=False, fontsize=8)
    mo.vstack([
        say(
            r"""
            ## Three paths

            x reaches the output directly, through the variance, and through the mean. Where paths meet, gradients add (lesson 1).
            To see the share of each path, the page gives every path a copy of x of its own, and asks the engine for the gradient
            of each copy.
            """,
            r"""
            ## 세 갈래 길

            x가 출력에 이르는 길은 세 갈래입니다. 곧장 가는 길, 분산을 거치는 길, 평균을 거치는 길이 있습니다. 길이 만나는 곳에서는
            그래디언트를 더합니다(1과). 길마다 몫을 알아보려고, 여기서는 길마다 x의 복사본을 하나씩 주고 복사본의 그래디언트를 엔진에
            물어봅니다.
            """,
        ),
        picture(figure, say.pick("The share of each path in the gradient", "그래디언트에서 길마다 차지하는 몫")),
        table({**{name: share[:, 0] for name, share in shares.items()},
               say.pick("their sum", "합"): total[:, 0], "autograd": gradient["x"][:, 0]}, head=SAMPLES),
        say(
            r"""
            The sum and autograd differ by [[off]]. Two things stand out.

            - The mean's path gives **every sample the same**: a change of μ moves all $x - \mu$ alike.
            - There is a fourth path: μ acts on the variance too, through `xmu`. Its share is 0, for the deviations sum to 0,
              $\sum (x_i - \mu) = 0$, and the derivative of σ² by μ is just −2 times their mean. That is why one speaks of three.
            """,
            r"""
            합과 자동 미분의 차이는 [[off]]입니다. 두 가지가 눈에 띕니다.

            - 평균을 거치는 길의 몫은 **모든 샘플에서 같습니다**. μ가 변하면 모든 $x - \mu$가 똑같이 움직이기 때문입니다.
            - 네 번째 길도 있습니다. μ는 `xmu`를 거쳐 분산에도 영향을 줍니다. 하지만 그 몫은 0입니다. 편차의 합이
              $\sum (x_i - \mu) = 0$이고, σ²를 μ로 미분한 값은 편차의 평균에 −2를 곱한 것이기 때문입니다. 그래서 보통 세
              갈래라고 합니다.
            """,
            off=np.abs(total - gradient["x"]).max(),
        ),
    ])  # fmt: skip
    return


@app.cell
def _(gradient, say, value):
    xhat, dxhat = value["xhat"], gradient["xhat"]
    n, scale = len(xhat), value["ivar"]
    closed = scale / n * (n * dxhat - dxhat.sum(0) - xhat * (dxhat * xhat).sum(0))
    dx = gradient["x"]
    left = (dx * xhat).sum(0)
    expected = scale * (dxhat * xhat).sum(0) * EPS / (value["var"] + EPS)
    say(
        r"""
        ## The closed form, and why things cancel

        Put the three together, with $\partial\hat x = g\,\gamma$:

        $$\partial x_i = \frac{1}{\sqrt{\sigma^2+\varepsilon}}\Big(\partial\hat x_i
        {}- \tfrac1N\textstyle\sum_j \partial\hat x_j
        {}- \hat x_i\,\tfrac1N\textstyle\sum_j \partial\hat x_j\,\hat x_j\Big)$$

        It agrees with autograd to [[off]]. Read it so: BatchNorm takes from the gradient two parts that it could not use.

        - Its **mean**. Adding a constant to all x changes nothing, so no gradient may point that way: Σ∂x = [[sum_dx]].
        - Its part **along x̂**. Stretching x about its mean changes nothing either, but for eps: Σ∂x·x̂ = [[along]], and the theory
          says [[expected]], the share that eps leaves.
        """,
        r"""
        ## 정리된 식, 그리고 왜 사라지는가

        $\partial\hat x = g\,\gamma$라 하고 세 길을 합치면 다음과 같습니다.

        $$\partial x_i = \frac{1}{\sqrt{\sigma^2+\varepsilon}}\Big(\partial\hat x_i
        {}- \tfrac1N\textstyle\sum_j \partial\hat x_j
        {}- \hat x_i\,\tfrac1N\textstyle\sum_j \partial\hat x_j\,\hat x_j\Big)$$

        자동 미분과의 차이는 [[off]]입니다. 이렇게 읽으면 됩니다. 배치 정규화는 그래디언트에서 쓸모없는 두 부분을 빼냅니다.

        - 그래디언트의 **평균**. 모든 x에 같은 수를 더해도 출력은 변하지 않으므로 그 방향의 그래디언트는 없어야 합니다:
          Σ∂x = [[sum_dx]].
        - 그래디언트에서 **x̂ 방향**의 성분. 평균을 중심으로 x를 늘여도 eps의 영향을 빼면 출력은 변하지 않습니다:
          Σ∂x·x̂ = [[along]]. 이론값은 eps가 남기는 몫인 [[expected]]입니다.
        """,
        off=np.abs(closed - dx).max(), sum_dx=np.round(dx.sum(0)[0], 12) + 0.0, along=left[0], expected=expected[0, 0],
    )  # fmt: skip
    return


@app.cell
def _(data, say):
    def layer_gradient():
        layer, t = nn.BatchNorm1d(2).astype(np.float64), Tensor(data, requires_grad=True)
        layer(t).backward(COTANGENT)
        return t.grad.numpy()

    fused_gradient = layer_gradient()
    with composed():
        composed_gradient = layer_gradient()
    report = testing.gradcheck(lambda t: F.batch_norm(t, training=True), data)
    say(
        r"""
        ## Composed = fused = differences

        `nn.BatchNorm1d` does not run nine steps but one fused op, with a kernel that reads memory as few times as it can. Under
        `with composed():` the same layer runs the steps. Their gradients differ by [[off]]. And `testing.gradcheck`
        compares with differences of the output: `[[report]]`.
        """,
        r"""
        ## 합성 = 융합 = 수치 미분

        `nn.BatchNorm1d`는 아홉 단계를 따로 실행하지 않고, 메모리를 되도록 적게 읽는 융합 연산(fused op) 하나로 계산합니다.
        `with composed():` 안에서는 같은 레이어가 아홉 단계로 계산합니다. 두 그래디언트의 차이는 [[off]]입니다. `testing.gradcheck`는
        출력의 수치 미분과 비교합니다: `[[report]]`.
        """,
        off=np.abs(fused_gradient - composed_gradient).max(), report=" ".join(map(str, report)),
    )  # fmt: skip
    return


@app.cell
def _(data, say):
    direction = np.random.default_rng(6).normal(size=(5, 2))

    def gradient_at(at):
        t = Tensor(at, requires_grad=True)
        return t, grad((F.batch_norm(t, training=True, eps=EPS) * COTANGENT).sum(), t, create_graph=True)

    t, once = gradient_at(data)
    twice = grad((once * direction).sum(), t).numpy()
    h = 1e-4
    difference = (gradient_at(data + h * direction)[1] - gradient_at(data - h * direction)[1]).numpy() / (2 * h)
    mo.vstack([
        say(
            r"""
            ## The second derivative

            The loss Σ g·BN(x) is linear in the output, but not in x: the gradient changes as x moves. `create_graph=True` makes the
            gradient a tensor with a graph, and `grad` of it along a direction v gives H·v. No one wrote that rule: it follows from
            the steps. Below, channel 1, with the difference of two gradients as a witness.
            """,
            r"""
            ## 2차 미분

            손실 Σ g·BN(x)는 출력에 대해서는 일차식이지만 x에 대해서는 아닙니다. x가 움직이면 그래디언트도 변합니다.
            `create_graph=True`를 쓰면 그래디언트도 그래프를 가진 텐서가 되고, 그것을 방향 v로 다시 `grad`하면 H·v가 나옵니다. 이
            규칙을 누가 따로 적은 것이 아니라 아홉 단계에서 저절로 나옵니다. 아래는 채널 1이고, 두 그래디언트의 차로 구한 값도 함께
            적었습니다.
            """,
        ),
        table({"H·v": twice[:, 0], say.pick("difference", "수치 미분"): difference[:, 0]}, head=SAMPLES),
        say(
            "The largest difference is [[off]].",
            "가장 큰 차이는 [[off]]입니다.",
            off=np.abs(twice - difference).max(),
        ),
    ])  # fmt: skip
    return


@app.cell
def _(say):
    say("## Exercises", "## 연습 문제")
    return


@app.cell
def _():
    asked = Tensor(BATCH, requires_grad=True)
    engine = F.batch_norm_steps(asked, Tensor(WEIGHT), Tensor(BIAS), eps=EPS)
    for each in engine:
        each.retain_grad()
    engine.out.backward(COTANGENT)
    given = {name: getattr(engine, name).numpy() for name in ("xmu", "sqrtvar", "ivar", "xhat")}
    given["dxhat"] = engine.xhat.grad.numpy()
    return asked, engine, given


@app.cell
def _(engine, given, one, say):
    say.exercise(
        "**1.** Walk back from `xhat` to `var`: compute `dvar` from `dxhat`, `xmu`, `sqrtvar` and `ivar`. One line for each "
        "step of the table is enough.",
        "**1.** `xhat`에서 `var`까지 거슬러 올라가 보세요. `dxhat`, `xmu`, `sqrtvar`, `ivar`로 `dvar`를 구합니다. 표의 단계마다 "
        "한 줄이면 됩니다.",
        one,
        "divar = (dxhat * xmu).sum(axis=0, keepdims=True)\ndsqrtvar = -divar / sqrtvar**2\ndvar = dsqrtvar / (2 * sqrtvar)",
        expects(dvar=engine.var.grad.numpy()),
        **given,
    )
    return


@app.cell
def _(asked, given, say, two):
    say.exercise(
        "**2.** Write the closed form: `dx` from `dxhat`, `xhat` and `ivar` alone.",
        "**2.** 정리된 식을 코드로 적어 보세요. `dxhat`, `xhat`, `ivar`만으로 `dx`를 구합니다.",
        two,
        "N = len(xhat)\ndx = ivar / N * (N * dxhat - dxhat.sum(0) - xhat * (dxhat * xhat).sum(0))",
        expects(dx=asked.grad.numpy()),
        **given,
    )
    return


if __name__ == "__main__":
    app.run()
