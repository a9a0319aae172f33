# /// script
# [tool.marimo.opengraph]
# title = "2. Normalise 1 … 20"
# description = "1부터 20까지 정규화하기"
# ///
import marimo

app = marimo.App(app_title="2. Normalise 1 … 20 / 1부터 20까지 정규화", css_file="lessons.css")

with app.setup:
    import marimo as mo
    import numpy as np
    from common import Say, difference, editor, expects, language_switch, missing, no_numbers, picture, table

    from tinygrad_bn import Tensor, nn, viz
    from tinygrad_bn import functional as F


@app.cell
def _():
    # All controls are made here, so that they keep their values when the language changes.
    language = language_switch()
    weight = mo.ui.slider(0, 10, 0.5, value=2, label="weight γ", show_value=True)
    bias = mo.ui.slider(-5, 15, 0.5, value=1, label="bias β", show_value=True)
    spread = mo.ui.slider(-6, 1, 0.5, value=0, label="log₁₀ σ", show_value=True)
    eps = mo.ui.slider(-8, -1, 1, value=-5, label="log₁₀ eps", show_value=True)
    size = mo.ui.slider(2, 32, 1, value=4, label="N", show_value=True)
    one = editor("# X = [1, 2, …, 20]\nxhat = X")
    two = editor("# x: (6, 3)\nweight = np.ones(3)\nbias = np.zeros(3)")
    language
    return bias, eps, language, one, size, spread, two, weight


@app.cell
def _(language):
    say = Say(language)
    say(
        r"""
        # 2. Normalise 1 … 20

        BatchNorm does one thing to each channel of a batch: it moves the mean to 0 and the variance to 1. Then it
        lets the network undo that. Here you do it by hand with the numbers 1 to 20, as the fourth article does, and
        then with the engine. It takes about ten minutes.
        """,
        r"""
        # 2. 1부터 20까지 정규화하기

        배치 정규화가 각 채널에 하는 일은 하나입니다. 평균을 0으로, 분산을 1로 맞추는 것이지요. 그런 다음 신경망이
        필요하면 되돌릴 수 있게 해 둡니다. 네 번째 글처럼 1부터 20까지의 수로 먼저 직접 해 보고, 같은 일을 엔진으로도 해
        봅시다. 10분쯤 걸립니다.
        """,
    )
    return (say,)


@app.cell
def _(say):
    X = np.arange(1, 21)
    mu, var = X.mean(), X.var()
    xhat = (X - mu) / X.std()
    say(
        r"""
        ## By hand

        ```python
        X = np.arange(1, 21)
        xhat = (X - X.mean()) / X.std()
        ```

        $$\mu = \frac{1}{N}\sum_i x_i$$

        $$\sigma^2 = \frac{1}{N}\sum_i (x_i - \mu)^2$$

        $$\hat x_i = \frac{x_i - \mu}{\sigma}$$

        The mean is [[mu]], the variance [[var]]. The smallest number becomes [[low]], the largest [[high]]. The new mean
        is [[new_mean]] and the new variance [[new_var]]. The order and the relative distances stay: normalising only
        shifts and stretches.
        """,
        r"""
        ## 직접 계산하기

        ```python
        X = np.arange(1, 21)
        xhat = (X - X.mean()) / X.std()
        ```

        $$\mu = \frac{1}{N}\sum_i x_i$$

        $$\sigma^2 = \frac{1}{N}\sum_i (x_i - \mu)^2$$

        $$\hat x_i = \frac{x_i - \mu}{\sigma}$$

        평균은 [[mu]], 분산은 [[var]]입니다. 정규화하면 가장 작은 수는 [[low]], 가장 큰 수는 [[high]]입니다.
        평균은 [[new_mean]], 분산은 [[new_var]]입니다. 순서와 간격의 비율은 그대로입니다. 정규화는 옮기고 늘이거나 줄일
        뿐입니다.
        """,
        mu=mu, var=var, low=xhat[0], high=xhat[-1], new_mean=abs(xhat.mean().round(12)), new_var=xhat.var(),
    )  # fmt: skip
    return X, mu, var, xhat


@app.cell
def _(X, say, xhat):
    y = F.batch_norm(Tensor(X.reshape(20, 1), dtype=np.float64), training=True, eps=0.0).numpy().ravel()
    say(
        r"""
        ## With the engine

        `F.batch_norm(x, training=True, eps=0.0)` takes twenty samples of one channel, an array of shape (20, 1). The
        largest difference from the result by hand is [[difference]].
        """,
        r"""
        ## 엔진으로 계산하기

        `F.batch_norm(x, training=True, eps=0.0)`에 샘플 20개, 채널 1개인 (20, 1) 배열을 넣습니다. 직접 계산한 값과
        가장 크게 다른 곳의 차이는 [[difference]]입니다.
        """,
        difference=np.abs(y - xhat).max(),
    )
    return


@app.cell
def _(bias, say, weight):
    say(
        r"""
        ## Weight and bias: the way back

        $$y_i = \gamma\,\hat x_i + \beta$$

        Mean 0 and variance 1 are not best for every layer: a sigmoid is nearly a straight line there. So BatchNorm has two
        parameters for each channel, which are learned. γ (`weight`) scales, β (`bias`) shifts; they begin with 1 and 0.
        Move them, and try to get 1 … 20 back.

        [[weight]]

        [[bias]]
        """,
        r"""
        ## γ와 β: 되돌아가는 길

        $$y_i = \gamma\,\hat x_i + \beta$$

        평균 0, 분산 1이 모든 레이어에 가장 좋은 것은 아닙니다. 그 범위에서 시그모이드(sigmoid)는 거의 직선이라 활성화 함수의
        비선형성이 사라질 수 있습니다. 그래서 채널마다 학습되는 파라미터가 둘 있습니다. γ(`weight`)는 확대(scale), β(`bias`)는
        이동(shift)을 맡고, 초깃값은 1과 0입니다. 움직여서 1부터 20까지의 수를 되찾아 보세요.

        [[weight]]

        [[bias]]
        """,
        weight=weight, bias=bias,
    )  # fmt: skip
    return


@app.cell
def _(X, bias, mu, say, var, weight):
    layer = nn.BatchNorm1d(1).astype(np.float64)
    layer.load_state_dict({**layer.state_dict(), "weight": [weight.value], "bias": [bias.value]})
    out = layer(Tensor(X.reshape(20, 1), dtype=np.float64)).numpy().ravel()
    exact = nn.BatchNorm1d(1).astype(np.float64)
    exact.load_state_dict({**exact.state_dict(), "weight": [var**0.5], "bias": [mu]})
    restored = exact(Tensor(X.reshape(20, 1), dtype=np.float64)).numpy().ravel()
    figure, ((axes,),) = viz.subplots(1, 1, 4.8, 3)
    axes.plot(X, X, "o", color="0.6", label="x")
    axes.plot(X, out, "o", color=viz.COLOURS[1], label="γ x̂ + β")
    axes.set(xlabel="x", ylabel="y", ylim=(-22, 35), xticks=(1, 5, 10, 15, 20))
    viz.legend_below(axes)
    mo.vstack([
        picture(figure, say.pick("The numbers before and after BatchNorm", "배치 정규화 전과 후의 값")),
        say(
            r"""
            Now the output has the mean [[out_mean]] and the standard deviation [[out_std]]: that is β and γ, whatever
            the input was. With γ = σ = [[sigma]] and β = μ = [[mu]] the layer returns its input, except for [[off]],
            which comes from eps. So a network with BatchNorm can compute all that it could without.
            """,
            r"""
            지금 출력의 평균은 [[out_mean]], 표준편차는 [[out_std]]입니다. 입력이 무엇이든 출력의 평균과 표준편차는 β와
            γ가 정합니다. γ = σ = [[sigma]], β = μ = [[mu]]이면 입력이 그대로 나옵니다. [[off]]의 차이가 남는 것은 eps
            때문입니다. 그러니 배치 정규화를 넣어도 신경망이 표현할 수 있는 것은 줄지 않습니다.
            """,
            out_mean=out.mean(), out_std=out.std(), sigma=var**0.5, mu=mu, off=np.abs(restored - X).max(),
        ),
    ])  # fmt: skip
    return


@app.cell
def _(eps, say, spread):
    say(
        r"""
        ## eps, and a channel that does not vary

        $$\hat x_i = \frac{x_i - \mu}{\sqrt{\sigma^2 + \varepsilon}}$$

        If all values of a channel are equal, then σ = 0, and 0 / 0 is no number. A small eps in the root prevents that.
        Its price: the variance of $\hat x$ is not 1 but $\sigma^2/(\sigma^2+\varepsilon)$. Make the data narrow, and
        look when eps begins to matter.

        [[spread]]

        [[eps]]
        """,
        r"""
        ## eps, 그리고 값이 모두 같은 채널

        $$\hat x_i = \frac{x_i - \mu}{\sqrt{\sigma^2 + \varepsilon}}$$

        한 채널의 값이 모두 같으면 σ = 0이고, 0 / 0은 수가 아닙니다. 제곱근 안에 더하는 작은 값 eps(epsilon)가 이를
        막습니다. 대신 $\hat x$의 분산이 정확히 1이 아니라 $\sigma^2/(\sigma^2+\varepsilon)$이 됩니다. 데이터의 폭을 좁히면서
        eps가 언제부터 영향을 주는지 보세요.

        [[spread]]

        [[eps]]
        """,
        spread=spread, eps=eps,
    )  # fmt: skip
    return


@app.cell
def _(eps, say, spread, xhat):
    narrow = Tensor((10**spread.value * xhat).reshape(20, 1), dtype=np.float64)
    normal = F.batch_norm(narrow, training=True, eps=10.0**eps.value).numpy()
    constant = F.batch_norm(Tensor(np.full((20, 1), 7.1)), bias=Tensor(np.array([0.25])), training=True).numpy()
    say(
        r"""
        With σ² = [[var]] and eps = [[eps_now]] the variance of $\hat x$ is [[result]]; the formula gives [[formula]].
        The usual eps of $10^{-5}$ does nothing visible at σ = 1, and halves the variance at σ = $\sqrt{10^{-5}}$ ≈ [[half]].
        A constant channel gives exactly the bias: twenty times 7.1, with β = 0.25, becomes [[low]] … [[high]].
        """,
        r"""
        σ² = [[var]], eps = [[eps_now]]일 때 $\hat x$의 분산은 [[result]]입니다. 공식의 값은 [[formula]]입니다. 흔히 쓰는
        eps = $10^{-5}$는 σ = 1에서는 거의 영향이 없지만, σ = $\sqrt{10^{-5}}$ ≈ [[half]]일 때는 분산을 절반으로 만듭니다.
        값이 모두 같은 채널은 정확히 β가 됩니다. 7.1을 스무 개 넣고 β = 0.25로 두면 결과는 [[low]] … [[high]]입니다.
        """,
        var=10 ** (2 * spread.value), eps_now=10.0**eps.value, result=normal.var(),
        formula=10 ** (2 * spread.value) / (10 ** (2 * spread.value) + 10.0**eps.value),
        half=1e-5**0.5, low=constant.min(), high=constant.max(),
    )  # fmt: skip
    return


@app.cell
def _(say, size):
    say(
        r"""
        ## Biased or unbiased variance

        There are two variances. Divide by N, and you describe *this batch*: that is what normalises it, for then
        $\hat x$ has exactly the variance 1. Divide by N − 1, and you estimate the variance of *all data*, from which the
        batch is a sample: that is what the layer stores as running variance, for evaluation. The biased one is too
        small on average, because the mean μ was fitted to the same batch. Draw many batches from data of variance 1:

        Batch size [[size]]
        """,
        r"""
        ## 편향 분산과 불편 분산

        분산에는 두 가지가 있습니다. N으로 나누면 *이 배치*의 분산입니다. 배치를 정규화할 때는 이것을 씁니다. 그래야 $\hat x$의
        분산이 정확히 1이 됩니다. N − 1로 나누면 이 배치를 표본으로 삼아 *전체 데이터*의 분산을 추정한 값, 즉 표본 분산(sample
        variance)입니다. 평가할 때 쓸 이동 분산(running variance)에는 이것을 저장합니다. N으로 나눈 분산은 평균적으로 작게
        나옵니다. 평균 μ를 같은 배치에 맞추어 구했기 때문입니다. 분산이 1인 데이터에서 배치를 많이 뽑아 봅시다.

        배치 크기 [[size]]
        """,
        size=size,
    )
    return


@app.cell
def _(say, size):
    batches = np.random.default_rng(0).normal(size=(20_000, size.value))
    biased, unbiased = batches.var(axis=1), batches.var(axis=1, ddof=1)
    tracking = nn.BatchNorm1d(1, momentum=1.0)
    tracking(Tensor(batches[0].reshape(-1, 1), dtype=np.float32))
    mo.vstack([
        table(
            {
                say.pick("divided by N", "N으로 나눔"): (biased.mean(), 1 - 1 / size.value),
                say.pick("divided by N − 1", "N − 1로 나눔"): (unbiased.mean(), 1.0),
            },
            head=("", say.pick("mean of 20,000 batches", "배치 20,000개의 평균"), say.pick("in theory", "이론값")),
        ),
        say(
            r"""
            The first batch has the biased variance [[first]] and the unbiased one [[second]]; the layer stores [[stored]].
            The two differ by the factor N / (N − 1): [[now]] here, and [[later]] at a batch size of 32.
            """,
            r"""
            첫 배치의 분산은 N으로 나누면 [[first]], N − 1로 나누면 [[second]]입니다. 레이어에 저장된 값은 [[stored]]입니다.
            둘의 비율은 N / (N − 1)입니다. 지금은 [[now]]이고, 배치 크기가 32라면 [[later]]입니다.
            """,
            first=biased[0], second=unbiased[0], stored=tracking.running_var.numpy()[0],
            now=size.value / (size.value - 1), later=32 / 31,
        ),
    ])  # fmt: skip
    return


@app.cell
def _(say):
    say("## Exercises", "## 연습 문제")
    return


@app.cell
def _(X, one, say):
    engine = F.batch_norm(Tensor(X.reshape(20, 1), dtype=np.float64), training=True, eps=1.0).numpy().ravel()
    say.exercise(
        "**1.** Normalise `X` with eps = 1, as BatchNorm does it. Use NumPy alone.",
        "**1.** 배치 정규화와 같은 방법으로 eps = 1을 써서 `X`를 정규화하세요. NumPy만 씁니다.",
        one,
        "xhat = (X - X.mean()) / np.sqrt(X.var() + 1)",
        expects(xhat=engine),
        X=X,
    )
    return


@app.cell
def _(say, two):
    sample = np.random.default_rng(1).normal([3, -1, 10], [2, 0.5, 4], (6, 3))

    def gives_back(answer):
        for name in ("weight", "bias"):
            if wrong := missing(answer, name) or no_numbers(name, answer[name]):
                return wrong
            if np.shape(answer[name]) != (3,):
                return difference(name, answer[name], np.zeros(3))
        vectors = (Tensor(np.asarray(answer[name], float)) for name in ("weight", "bias"))
        result = F.batch_norm(Tensor(sample), None, None, *vectors, training=True, eps=1e-5)
        return expects(out=sample)({"out": result.numpy()})

    say.exercise(
        "**2.** Find a `weight` and a `bias` with which BatchNorm (eps = 1e-5) returns a batch `x` of three channels.",
        "**2.** 배치 정규화(eps = 1e-5)를 거쳐도 채널이 3개인 배치 `x`가 그대로 나오도록 `weight`와 `bias`를 정하세요.",
        two,
        "weight = np.sqrt(x.var(axis=0) + 1e-5)\nbias = x.mean(axis=0)",
        gives_back,
        x=sample,
    )
    return


@app.cell
def _(say):
    say.next("lesson_3_backward", "3. The backward pass of BatchNorm", "배치 정규화의 역전파")
    return


if __name__ == "__main__":
    app.run()
