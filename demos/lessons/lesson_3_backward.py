# /// script
# [tool.marimo.opengraph]
# title = "3. The backward pass of BatchNorm"
# description = "배치 정규화의 역전파"
# ///
import marimo

app = marimo.App(app_title="3. The backward pass of BatchNorm / 배치 정규화의 역전파", css_file="lessons.css")

with app.setup:
    import marimo as mo
    import numpy as np
    from common import Say, editor, expects, folded, language_switch, picture, table, written

    from demos import bn_backward
    from demos.bn_figures import name_of
    from tinygrad_bn import Tensor, grad, nn, viz
    from tinygrad_bn import functional as F
    from tinygrad_bn.explain import compare_gradients, explain

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
    one = editor("# dxhat, xmu: (5, 2)\n# sqrtvar, ivar: (1, 2)\ndvar = np.zeros((1, 2))")
    two = editor("# dxhat, xhat: (5, 2)\n# ivar: (1, 2)\nN = len(xhat)\ndx = ivar * dxhat")
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
    with explain() as e:
        out = F.batch_norm(x, weight=weight, bias=bias, training=True, eps=EPS)
        out.backward(COTANGENT)
    value = {name: e[name].value for name in ("x", *STEPS)}
    gradient = {name: e[name].grad for name in ("x", *STEPS)}
    shares = {name_of(path): share for path, share in e["x"].paths.items()}
    routes = {name_of(path): path for path in e["x"].paths}
    return data, e, gradient, routes, shares, value


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
            {f"{name} = {formula}": (*(written(v, ".4f") for v in first(name)), rule) for name, (formula, rule) in STEPS.items()},
            head=(say.pick("step", "단계"), say.pick("value", "값"), "∂", say.pick("the rule of ∂", "∂의 규칙")),
        ),
    ])  # fmt: skip
    return


@app.cell
def _(gradient, routes, say, shares):
    total = np.sum(list(shares.values()), axis=0)
    names = {
        name: say.pick(name, korean)
        for name, korean in zip(routes, ("직접", "var를 거쳐", "mu를 거쳐", "mu와 var를 거쳐"), strict=True)
    }
    figure, ((axes,),) = viz.subplots(1, 1, 4.8, 3.4)
    bars = {names[name]: share for name, share in shares.items()} | {"∂x": total}
    for i, ((name, share), hue) in enumerate(zip(bars.items(), (*viz.COLOURS[:4], "0.5"), strict=True)):
        axes.bar(np.arange(1, 6) + 0.17 * (i - 2), share[:, 0], 0.17, color=hue, label=name)
    axes.axhline(0, color="0.5", linewidth=1)
    axes.set(xlabel=say.pick("sample", "샘플"), ylabel=say.pick("share of ∂x", "∂x에서 차지하는 몫"))
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    mo.vstack([
        say(
            r"""
            ## Four paths, and one of them is 0

            x reaches the output along four paths. Where paths meet, gradients add (lesson 1), so ∂x has four parts. The page
            records BatchNorm under `with explain() as e:`, and `e["x"].paths` is the share of each path:

            [[list]]
            """,
            r"""
            ## 네 경로, 그중 하나는 0

            x에서 출력으로 가는 경로는 네 개입니다. 경로가 만나는 곳에서는 그래디언트를 더하므로(1과) ∂x는 네 부분으로 나뉩니다. 이
            페이지는 `with explain() as e:` 안에서 배치 정규화를 계산하고, `e["x"].paths`로 경로마다 차지하는 몫을 구합니다.

            [[list]]
            """,
            list="\n".join(f"- **{names[name]}**: `{route}`" for name, route in routes.items()),
        ),
        picture(figure, say.pick("The share of each path in the gradient", "그래디언트에서 경로마다 차지하는 몫")),
        table({**{names[name]: share[:, 0] for name, share in shares.items()},
               say.pick("their sum", "합"): total[:, 0], "autograd": gradient["x"][:, 0]}, head=SAMPLES),
        say(
            r"""
            The sum and autograd differ by [[off]]. Two things stand out.

            - Through mu, **every sample gets the same**: a change of μ moves all $x - \mu$ alike.
            - Through mu *and* var the share is [[fourth]], wherever the slider stands. A change of μ changes the variance by −2
              times the mean of all $x_i - \mu$, and that mean is 0. So many texts count only three paths.
            """,
            r"""
            합과 자동 미분의 차이는 [[off]]입니다. 두 가지가 눈에 띕니다.

            - mu를 거치는 경로의 몫은 **모든 샘플에서 같습니다**. μ가 변하면 모든 $x - \mu$가 똑같이 움직이기 때문입니다.
            - mu와 var를 *모두* 거치는 경로의 몫은 슬라이더가 어디에 있든 [[fourth]]입니다. μ가 변할 때 분산은 모든 $x_i - \mu$의
              평균에 −2를 곱한 만큼 변하는데, 그 평균이 0이기 때문입니다. 그래서 경로가 세 개라고 하는 글이 많습니다.
            """,
            off=np.abs(total - gradient["x"]).max(), fourth=np.abs(shares["through mu and var"]).max().round(12),
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

        Add the paths up, with $\partial\hat x = g\,\gamma$:

        $$\begin{aligned}\partial x_i = \tfrac{1}{\sqrt{\sigma^2+\varepsilon}}\Big(\partial\hat x_i
        &- \tfrac1N\textstyle\sum_j \partial\hat x_j \\
        &- \hat x_i\,\tfrac1N\textstyle\sum_j \partial\hat x_j\,\hat x_j\Big)\end{aligned}$$

        It agrees with autograd to [[off]]. Read it like this: BatchNorm removes two parts of the gradient that would change nothing.

        - Its **mean**. Adding a constant to all x changes nothing, so no gradient may point that way: Σ∂x = [[sum_dx]].
        - Its part **along x̂**. Stretching x about its mean changes nothing either, but for eps: Σ∂x·x̂ = [[along]], and the theory
          says [[expected]], the share that eps leaves.
        """,
        r"""
        ## 정리된 식, 그리고 왜 사라지는가

        $\partial\hat x = g\,\gamma$라 하고 경로를 모두 더하면 다음과 같습니다.

        $$\begin{aligned}\partial x_i = \tfrac{1}{\sqrt{\sigma^2+\varepsilon}}\Big(\partial\hat x_i
        &- \tfrac1N\textstyle\sum_j \partial\hat x_j \\
        &- \hat x_i\,\tfrac1N\textstyle\sum_j \partial\hat x_j\,\hat x_j\Big)\end{aligned}$$

        자동 미분과의 차이는 [[off]]입니다. 이렇게 읽으면 됩니다. 배치 정규화는 그래디언트에서 출력을 바꾸지 못하는 두 부분을 빼냅니다.

        - 그래디언트의 **평균**. 모든 x에 같은 수를 더해도 출력은 변하지 않으므로 그 방향의 그래디언트는 없어야 합니다:
          Σ∂x = [[sum_dx]].
        - 그래디언트에서 **x̂ 방향**의 성분. 평균을 중심으로 x를 늘여도 eps의 영향을 빼면 출력은 변하지 않습니다:
          Σ∂x·x̂ = [[along]]. 이론값은 eps가 남기는 몫인 [[expected]]입니다.
        """,
        off=np.abs(closed - dx).max(), sum_dx=np.round(dx.sum(0)[0], 12) + 0.0, along=left[0], expected=expected[0, 0],
    )  # fmt: skip
    return


@app.cell
def _(data, e, say):
    layer = nn.BatchNorm1d(2, eps=EPS).astype(np.float64)
    layer.load_state_dict({**layer.state_dict(), "weight": WEIGHT, "bias": BIAS})
    comparison = compare_gradients(layer, data, COTANGENT)
    by_method = dict(zip(
        (say.pick("composed", "합성"), say.pick("fused", "융합"), say.pick("closed form", "정리된 식"),
         say.pick("differences", "수치 미분")),
        comparison.gradients["x"].values(), strict=True,
    ))  # fmt: skip
    mo.vstack([
        say(
            r"""
            ## Composed = fused = closed form = differences

            `nn.BatchNorm1d` does not run nine steps but one **fused** op, with a kernel that reads memory as few times as it can.
            Is its gradient the same? `compare_gradients(layer, x, g)` computes it in four ways. Here is ∂x of channel 1:
            """,
            r"""
            ## 합성 = 융합 = 정리된 식 = 수치 미분

            `nn.BatchNorm1d`는 아홉 단계를 따로 실행하지 않고, 메모리를 되도록 적게 읽는 **융합 연산**(fused op) 하나로 계산합니다.
            그래도 그래디언트가 같을까요? `compare_gradients(layer, x, g)`는 네 가지 방법으로 구합니다. 채널 1의 ∂x입니다.
            """,
        ),
        table({name: gradient_x[:, 0] for name, gradient_x in by_method.items()}, head=SAMPLES),
        say(
            r"""
            From the composed gradient, the fused one differs by at most [[fused:.2g]] ULP, and the closed form by [[closed:.2g]].
            (A ULP is the distance from one float64 number to the next.) Differences of the output are no formula at all, and
            agree to [[numeric:.1g]].
            """,
            r"""
            합성으로 구한 값과 비교하면 융합은 최대 [[fused:.2g]] ULP, 정리된 식은 [[closed:.2g]] ULP만큼 다릅니다. (ULP는 float64 수
            하나와 그다음 수 사이의 간격입니다.) 수치 미분은 공식 없이 출력의 차이만으로 구한 값인데, [[numeric:.1g]] 안에서 같습니다.
            """,
            fused=comparison.ulps("x", "fused"), closed=comparison.ulps("x", "closed form"),
            numeric=np.abs(comparison.gradients["x"]["differences"] - comparison.gradients["x"]["composed"]).max(),
        ),
        folded(
            say.pick("The whole backward pass in words, with these numbers: e.narrate()",
                     "지금 이 수들로 역전파 전체를 말로 풀어 보기: e.narrate()"),
            e.narrate(say.language),
        ),
    ])  # fmt: skip
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
            the steps. Below, channel 1, with the difference of two gradients beside it.
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


@app.cell
def _(say):
    say.next("lesson_4_train_eval", "4. Train and eval", "학습 모드와 평가 모드")
    return


if __name__ == "__main__":
    app.run()
