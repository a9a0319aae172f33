# /// script
# [tool.marimo.opengraph]
# title = "5. When BatchNorm helps, and when it does not"
# description = "배치 정규화는 언제 도움이 되고 언제 되지 않나"
# ///
import marimo

app = marimo.App(app_title="5. When it helps / 언제 도움이 되나", css_file="lessons.css")

with app.setup:
    import experiments
    import marimo as mo
    import numpy as np
    from common import Say, editor, expects, language_switch, picture, table, written

    from demos import init_scale, loss_landscape
    from tinygrad_bn import Tensor, datasets, viz
    from tinygrad_bn import functional as F
    from tinygrad_bn.train.interval import interval

    SEEDS = range(3)
    DIGITS, HELD_OUT = datasets.load("mnist5k").scaled().split(1000, seed=0)
    TRAINING = DIGITS.take(np.arange(1000))


@app.cell
def _():
    # All controls are made here, so that they keep their values when the language changes.
    language = language_switch()
    factor = mo.ui.slider(steps=[0.01, 0.1, 0.5, 1, 2, 10, 100], value=2, label="k", show_value=True)
    activation = mo.ui.dropdown(list(experiments.ACTIVATIONS), value="tanh", label="activation / 활성화 함수")
    shift = mo.ui.slider(-8, 8, 1, value=0, label="shift / 이동", show_value=True)
    gain = mo.ui.slider(0.25, 4, 0.25, value=0.5, label="gain", show_value=True)
    depth = mo.ui.slider(2, 40, 2, value=10, label="depth / 깊이", show_value=True)
    std = mo.ui.slider(0, 15, 1, value=6, label="panel / 칸", show_value=True)
    rate = mo.ui.slider(-3, 1, 0.5, value=-2, label="log₁₀ lr", show_value=True)
    panels = mo.ui.run_button(label="▶ 16")
    one = editor("# w, dw_1: (3, 2)\n# x: (6, 3); g: (6, 2)\ndw = np.zeros((3, 2))")
    two = editor("# gains: (5,)\nlow, high = 0, 0")
    language
    return activation, depth, factor, gain, language, one, panels, rate, shift, std, two


@app.cell
def _(language):
    say = Say(language)
    say(
        r"""
        # 5. When BatchNorm helps, and when it does not

        Each experiment here trains real networks while you wait, for several seeds. A number with ± is the mean of the seeds
        and its 95 % interval: a difference counts if its interval does not contain 0. It takes about 15 minutes.
        """,
        r"""
        # 5. 배치 정규화는 언제 도움이 되고 언제 되지 않나

        여기서는 실험할 때마다 실제 신경망을 시드 여러 개로 그 자리에서 학습합니다. ±가 붙은 수는 시드들의 평균과 95 %
        구간입니다. 차이의 구간에 0이 들어 있지 않을 때만 차이가 있다고 봅니다. 15분쯤 걸립니다.
        """,
    )
    return (say,)


@app.cell
def _(factor, say):
    say(
        r"""
        ## The scale of the weights drops out

        BatchNorm divides by σ. If all weights before it become k times larger, so does σ, and the output stays:

        $$\text{BN}(k\,W x + b) = \text{BN}(W x)$$

        [[factor]]
        """,
        r"""
        ## 가중치의 크기는 상관이 없다

        배치 정규화는 σ로 나눕니다. 앞 레이어의 가중치가 모두 k배 커지면 σ도 k배가 되므로 출력은 그대로입니다.

        $$\text{BN}(k\,W x + b) = \text{BN}(W x)$$

        [[factor]]
        """,
        factor=factor,
    )
    return


@app.cell
def _(factor, say):
    rng = np.random.default_rng(0)
    inputs, cotangent = rng.normal(size=(32, 5)), rng.normal(size=(32, 4))
    start = rng.normal(size=(5, 4))

    def through(k):
        w, b = Tensor(k * start, requires_grad=True), Tensor(np.ones(4), requires_grad=True)
        y = F.batch_norm(Tensor(inputs) @ w + b, training=True)
        (y * cotangent).sum().backward()
        return w, b, y.numpy()

    w_1, _, y_1 = through(1)
    w_k, b_k, y_k = through(factor.value)
    dw_1, dw_k = w_1.grad.numpy(), w_k.grad.numpy()
    say(
        r"""
        With k = [[k]] the outputs differ by [[difference]] at most (eps makes them differ at all). The gradient of the
        weights becomes 1/k as large: [[ratio]] times. And W · ∂W = [[inner]]: the gradient is at right angles to the weights,
        for along them nothing changes. Three things follow.

        - Large initial weights do no harm, but they learn slowly: a step of gradient descent turns them by an angle ∝ lr / k².
        - Every step makes W longer (Pythagoras), which lowers the effective learning rate as training goes on. **Weight
          decay** before BatchNorm does not regularise the function; it keeps W short, and so the effective rate high.
        - A **bias** before BatchNorm is useless: μ takes it away again. The largest gradient of b is [[dead]], mere rounding.
          Write `nn.Linear(…, bias=False)`; β does its work.
        """,
        r"""
        k = [[k]]일 때 두 출력의 차이는 최대 [[difference]]입니다(eps 때문에 생기는 차이입니다). 가중치의 그래디언트는 1/k배, 곧
        [[ratio]]배가 됩니다. 그리고 W · ∂W = [[inner]]입니다. 가중치 방향으로는 아무리 움직여도 손실이 변하지 않으므로
        그래디언트는 가중치와 직각입니다. 여기서 세 가지를 알 수 있습니다.

        - 초기 가중치가 커도 문제는 없지만 천천히 배웁니다. lr·∂W만큼 갱신하면 방향이 lr / k²에 비례하는 각도만큼 바뀝니다.
        - 갱신할 때마다 W는 길어지고(피타고라스의 정리), 그만큼 실제 학습률은 학습이 진행될수록 낮아집니다. 배치 정규화 앞의
          **가중치 감소(weight decay)**는 함수를 규제하지 않습니다. W를 짧게 유지해서 실제 학습률을 높게 유지할 뿐입니다.
        - 배치 정규화 앞의 **편향(bias)**은 쓸모가 없습니다. μ를 뺄 때 함께 사라지기 때문입니다. b의 그래디언트는 가장 큰 것이
          [[dead]]로, 반올림 오차일 뿐입니다. `nn.Linear(…, bias=False)`로 쓰세요. 편향이 할 일은 β가 합니다.
        """,
        k=factor.value, difference=np.abs(y_k - y_1).max(), ratio=np.linalg.norm(dw_k) / np.linalg.norm(dw_1),
        inner=(w_k.numpy() * dw_k).sum(), dead=np.abs(b_k.grad.numpy()).max(),
    )  # fmt: skip
    return


@app.cell
def _(say, shift):
    say(
        r"""
        ## Before or after the activation?

        The paper of 2015 puts BatchNorm before the activation, and so do the articles. Here are five values of a channel, which
        the layer before may shift. ReLU cuts what is below 0:

        [[shift]]
        """,
        r"""
        ## 활성화 함수 앞에 둘까, 뒤에 둘까?

        2015년 논문은 배치 정규화를 활성화 함수 앞에 두었고, 글들도 그렇게 합니다. 다음은 한 채널의 값 다섯 개입니다. 앞 레이어가 이
        값들을 옮길 수 있고, ReLU는 0보다 작은 값을 자릅니다.

        [[shift]]
        """,
        shift=shift,
    )
    return


@app.cell
def _():
    placed = experiments.placed
    order = np.array([[placed(TRAINING, HELD_OUT, first, seed) for seed in range(5)] for first in (True, False)])
    return (order,)


@app.cell
def _(order, say, shift):
    moved = Tensor(np.array([[-3.0], [-1], [0], [1], [3]]) + shift.value)
    norm_first = F.relu(F.batch_norm(moved, training=True)).numpy()[:, 0]
    relu_first = F.batch_norm(F.relu(moved), training=True).numpy()[:, 0]
    mo.vstack([
        table({"x": moved.numpy()[:, 0], "ReLU(BN(x))": norm_first, "BN(ReLU(x))": relu_first},
              head=("", "1", "2", "3", "4", "5"), spec=".2f"),
        say(
            r"""
            *Before* ReLU, BatchNorm takes the shift off again, and ReLU always cuts the lower part. *After* ReLU it gets what is
            left: with a large shift nothing is cut, and the layer is linear; with a large negative one all values are 0, and
            no gradient passes. That is the case for "before". In training it may not matter: 784-100-100-100-10 on 1,000
            digits has after three epochs the accuracy [[before]] on other digits with BatchNorm before ReLU, [[after]] with
            it after, a difference of [[gain]]. Both orders are in use.
            """,
            r"""
            ReLU *앞*에 두면 배치 정규화가 옮겨진 만큼 되돌리므로, ReLU는 언제나 아래쪽 값을 자릅니다. *뒤*에 두면 ReLU를 지나고 남은
            값을 받습니다. 크게 옮기면 하나도 잘리지 않아 레이어가 일차 함수가 되고, 반대쪽으로 크게 옮기면 모두 0이 되어 그래디언트가
            지나가지 못합니다. 이것이 앞에 두는 이유입니다. 그래도 실제 학습에서는 차이가 없을 수 있습니다. 숫자 1,000장으로 784-100-100-100-10을 3 epoch
            학습하면, 다른 숫자에 대한 정확도가 ReLU 앞에 둘 때 [[before]], 뒤에 둘 때 [[after]]이고 차이는 [[gain]]입니다.
            두 순서 모두 쓰입니다.
            """,
            before=interval(order[0]), after=interval(order[1]), gain=interval(order[0] - order[1]),
        ),
    ])  # fmt: skip
    return


@app.cell
def _(activation, depth, gain, say):
    say(
        r"""
        ## Depth and saturation

        200 digits pass through layers of 100 units, before any training. Weights are normal with the standard deviation
        gain / √fan_in. Without BatchNorm a large gain drives tanh and sigmoid to their ends, where they are flat and pass no
        gradient; with a small one the signal dies.

        [[activation]]

        [[gain]]

        [[depth]]
        """,
        r"""
        ## 깊이와 포화

        숫자 그림 200장이 유닛 100개짜리 레이어들을 지나갑니다. 아직 학습하기 전이고, 가중치는 표준편차가 gain / √fan_in인
        정규분포입니다. 배치 정규화가 없을 때 gain이 크면 tanh와 sigmoid의 값이 양 끝에 몰리는데, 그곳은 평평해서 그래디언트가
        거의 전해지지 않습니다(포화). gain이 작으면 신호가 사라집니다.

        [[activation]]

        [[gain]]

        [[depth]]
        """,
        activation=activation, gain=gain, depth=depth,
    )  # fmt: skip
    return


@app.cell
def _(activation, depth, gain):
    how = activation.value, gain.value, depth.value
    flows = {bn: [experiments.flow(TRAINING, *how, bn, seed) for seed in SEEDS] for bn in (False, True)}
    return (flows,)


@app.cell
def _(activation, depth, flows, say):
    names = {False: say.pick("without BatchNorm", "배치 정규화 없음"), True: say.pick("with BatchNorm", "배치 정규화")}
    outputs, ((histogram,),) = viz.subplots(1, 1, 4.4, 2.8)
    norms, ((lines,),) = viz.subplots(1, 1, 4.4, 2.8)
    values = {bn: flows[bn][0][0][np.isfinite(flows[bn][0][0])] for bn in names}
    bins = np.histogram_bin_edges(np.concatenate([*values.values()]), 40)
    for (bn, name), hue in zip(names.items(), viz.COLOURS, strict=False):
        histogram.hist(values[bn], bins, color=hue, alpha=0.6, label=name)
        for _, grads in flows[bn]:
            lines.plot(range(1, depth.value + 1), np.where(np.array(grads) > 0, grads, np.nan), color=hue)
    histogram.set(title=say.pick(f"outputs of layer {depth.value}", f"{depth.value}번째 레이어의 출력"), yscale="log")
    lines.set(title=say.pick("gradient of each layer's output (norm)", "레이어별 출력의 그래디언트(크기)"),
              xlabel=say.pick("layer", "레이어"), yscale="log")  # fmt: skip
    histogram.locator_params(axis="x", nbins=5)
    viz.legend_below(histogram)
    growth = [[(g[0] / max(g[-1], 1e-300)) ** (1 / (depth.value - 1)) for _, g in flows[bn]] for bn in (False, True)]
    mo.vstack([
        mo.hstack([
            picture(outputs, say.pick("Histogram of the outputs of the last layer", "마지막 레이어 출력의 히스토그램")),
            picture(norms, say.pick("Norm of the gradient, layer by layer", "레이어별 그래디언트의 크기")),
        ], wrap=True, justify="start"),
        say(
            r"""
            On the way back the gradient changes per layer by a factor of [[without]] without BatchNorm, and of [[with_bn]]
            with it. With BatchNorm the gain does not matter, and nothing vanishes; but the factor is above 1. For ReLU it is
            about 1.2 in theory (Yang et al. 2019). That is harmless for ten layers, and explodes in a hundred:
            [[with_bn_again]] to the power of 100 is [[hundred]]. Residual connections solved this.
            """,
            r"""
            뒤로 레이어 하나를 지날 때마다 그래디언트는 배치 정규화가 없으면 [[without]]배, 있으면 [[with_bn]]배가 됩니다. 배치 정규화를
            쓰면 gain은 상관이 없고 그래디언트가 소실되지 않습니다. 하지만 배율이 1보다 큽니다. ReLU에서는 이론적으로 약 1.2입니다
            (Yang 등, 2019). 레이어 10개에서는 괜찮지만 100개에서는 폭주합니다. [[with_bn_again]]의 100제곱은 [[hundred]]입니다.
            이 문제는 잔차 연결(residual connection)로 풀었습니다.
            """,
            without=interval(growth[0]), with_bn=interval(growth[1]), with_bn_again=np.mean(growth[1]),
            hundred=np.mean(growth[1]) ** 100,
        ),
    ])  # fmt: skip
    return


@app.cell
def _(panels, rate, say, std):
    say(
        r"""
        ## Initial weights and learning rate: sixteen panels

        784-100-100-100-100-100-10 with ReLU on 1,000 digits, gradient descent, batches of 100, eight epochs. The panel sets
        the standard deviation of the initial weights, on a scale from 1 (panel 0) to 0.0001 (panel 15).

        [[std]]

        [[rate]]

        All panels at this learning rate, one seed each; it takes a while: [[panels]]
        """,
        r"""
        ## 초기 가중치와 학습률: 열여섯 칸

        ReLU를 쓰는 784-100-100-100-100-100-10 신경망을 숫자 1,000장으로 경사하강법, 배치 크기 100, 8 epoch 동안
        학습합니다. 칸(panel)마다 초기 가중치의 표준편차가 다릅니다. 1(칸 0)부터 0.0001(칸 15)까지 있습니다.

        [[std]]

        [[rate]]

        이 학습률로 열여섯 칸을 모두, 시드 하나씩 학습합니다. 잠시 걸립니다: [[panels]]
        """,
        std=std, rate=rate, panels=panels,
    )  # fmt: skip
    return


@app.cell
def _(rate, say, std):
    raced = np.array([experiments.race(TRAINING, std.value, 10.0**rate.value, seed) for seed in SEEDS])[:, :, -1].T
    say(
        r"""
        Standard deviation [[deviation]], learning rate [[lr]]. Accuracy on the training digits without BatchNorm:
        [[without]], with it: [[with_bn]], difference [[gain]]. Try panel 2 with the rate $10^{-2}$: the weights suit the
        network there, and it learns *faster without* BatchNorm. Then try the rate 1.
        """,
        r"""
        표준편차 [[deviation]], 학습률 [[lr]]. 학습 데이터의 정확도는 배치 정규화가 없으면 [[without]], 있으면 [[with_bn]]이고,
        차이는 [[gain]]입니다. 칸 2와 학습률 $10^{-2}$를 골라 보세요. 가중치가 신경망에 잘 맞는 곳이라 배치 정규화가
        *없을 때* 더 빨리 배웁니다. 그다음 학습률 1도 골라 보세요.
        """,
        deviation=float(init_scale.SCALES[std.value]), lr=10.0**rate.value, without=interval(raced[0]),
        with_bn=interval(raced[1]), gain=interval(raced[1] - raced[0]),
    )  # fmt: skip
    return


@app.cell
def _(panels, rate, say):
    mo.stop(not panels.value)
    all_panels, grid = viz.subplots(4, 4, 5, 5.4, sharex=True, sharey=True)
    for panel, axes in enumerate(mo.status.progress_bar(list(grid.flat))):
        curves = experiments.race(TRAINING, panel, 10.0**rate.value, 0)
        labels = say.pick("without BatchNorm", "배치 정규화 없음"), say.pick("with BatchNorm", "배치 정규화")
        for label, colour, line in zip(labels, viz.COLOURS, curves, strict=False):
            axes.plot(range(1, len(line) + 1), line, color=colour, label=label)
        axes.set_title(f"{init_scale.SCALES[panel]:.2g}", fontsize=9)
        axes.set(ylim=(0, 1.02))
    title = say.pick("accuracy by epoch, for this deviation of weights", "가중치의 표준편차별 epoch에 따른 정확도")
    all_panels.suptitle(title, fontsize=10)
    viz.legend_below(grid[0, 0])
    picture(
        all_panels, say.pick("Training accuracy for sixteen scales of weights", "초기 가중치 열여섯 가지의 학습 정확도")
    )
    return


@app.cell
def _(say):
    models = loss_landscape.MODELS
    without_bn, with_bn, with_noisy = np.array([[experiments.noisy(TRAINING, m, s) for s in range(4)] for m in models])
    mo.vstack([
        say(
            r"""
            ## Is it the covariate shift?

            The paper of 2015 explains BatchNorm by *internal covariate shift*: the distribution of a layer's inputs changes
            as the layers before it learn, and BatchNorm holds it still. Santurkar et al. (2018) tested that. They put noise
            **behind** each BatchNorm, a new shift and scale for every unit at every step, so that the distributions jump
            about. Here are training losses after five epochs at the rate 0.2:
            """,
            r"""
            ## 공변량 변화 때문일까?

            2015년 논문은 배치 정규화의 효과를 *내부 공변량 변화(Internal Covariate Shift)*로 설명합니다. 앞 레이어들이 학습하면
            다음 레이어에 들어오는 입력의 분포가 계속 변하는데, 배치 정규화가 그것을 붙잡아 준다는 것입니다. Santurkar 등(2018)은
            이를 실험해 보았습니다. 배치 정규화 **뒤에** 잡음을 넣어, 갱신할 때마다 유닛마다 다른 크기로 값을 옮기고 늘여서 분포를
            일부러 흔들었습니다. 다음은 학습률 0.2로 5 epoch 학습한 뒤의 손실입니다.
            """,
        ),
        table(
            {
                say.pick("without BatchNorm", "배치 정규화 없음"): [written(interval(without_bn))],
                say.pick("with BatchNorm", "배치 정규화"): [written(interval(with_bn))],
                say.pick("with noise behind it", "배치 정규화 + 잡음"): [written(interval(with_noisy))],
            },
            head=("", say.pick("training loss", "학습 손실")),
        ),
        say(
            r"""
            The loss with noise is lower than that without BatchNorm by [[ahead]], though here the distributions move the most. So steady distributions are not the main reason. What Santurkar et al. found instead: the loss becomes
            smoother, and a gradient stays right for a longer step. `python -m demos loss_landscape` measures it.
            """,
            r"""
            잡음을 넣은 신경망은 분포가 가장 심하게 흔들리는데도 배치 정규화가 없는 신경망보다 손실이 [[ahead]]만큼 낮습니다.
            그러니 분포가 안정되는 것이 주된 이유는 아닙니다. Santurkar 등이 찾은 이유는 손실 함수가 더 매끄러워진다는 것입니다.
            그래서 그래디언트를 믿고 더 크게 움직일 수 있습니다. `python -m demos loss_landscape`로 재 볼 수 있습니다.
            """,
            ahead=interval(without_bn - with_noisy),
        ),
    ])  # fmt: skip
    return


@app.cell
def _():
    iris = np.array([experiments.iris(seed) for seed in range(6)]).T
    titanic = np.array([experiments.titanic(seed) for seed in range(8)]).T
    return iris, titanic


@app.cell
def _(iris, say, titanic):
    mo.vstack([
        say(
            r"""
            ## Iris and Titanic, honestly

            The articles train small networks on small data. Here they are again, each seed with another split:
            """,
            r"""
            ## 붓꽃과 타이타닉, 솔직하게

            글들은 작은 데이터로 작은 신경망을 학습합니다. 같은 실험을 시드마다 데이터를 다르게 나누어 다시 해 봅시다.
            """,
        ),
        table(
            {
                "Iris": [written(interval(v)) for v in (*iris, iris[1] - iris[0])],
                "Titanic": [written(interval(v)) for v in (*titanic, titanic[1] - titanic[0])],
            },
            head=(
                say.pick("test accuracy", "테스트 정확도"), say.pick("without", "없음"), say.pick("with", "있음"),
                say.pick("difference", "차이"),
            ),
        ),
        say(
            r"""
            One flower of the 30 is worth [[flower:.3f]]. For a single seed, the difference on Titanic varied between [[low:.3f]] and
            [[high:.3f]]: one run with and one run without, like 69 % and 71 % in the second article, show nothing. BatchNorm pays
            in deep networks, with large learning rates and with badly scaled weights. A small network on small data has none
            of these.
            """,
            r"""
            붓꽃은 테스트용 30송이 가운데 한 송이가 [[flower:.3f]]에 해당합니다. 타이타닉에서 시드 하나만 보면 차이가 [[low:.3f]]에서
            [[high:.3f]]까지 나왔습니다. 두 번째 글의 69 %와 71 %처럼 한 번씩만 돌려 본 결과로는 아무것도 알 수 없습니다. 배치
            정규화는 신경망이 깊을 때, 학습률이 클 때, 가중치의 크기가 맞지 않을 때 효과가 있습니다. 작은 데이터의 작은
            신경망에는 해당하는 것이 없습니다.
            """,
            flower=1 / 30, low=(titanic[1] - titanic[0]).min(), high=(titanic[1] - titanic[0]).max(),
        ),
    ])  # fmt: skip
    return


@app.cell
def _(say):
    say("## Exercises", "## 연습 문제")
    return


@app.cell
def _(one, say):
    rng_1 = np.random.default_rng(4)
    x_1, w_0, g_1 = rng_1.normal(size=(6, 3)), rng_1.normal(size=(3, 2)), rng_1.normal(size=(6, 2))

    def gradient_at(k):
        w = Tensor(k * w_0, requires_grad=True)
        (F.batch_norm(Tensor(x_1) @ w, training=True, eps=0.0) * g_1).sum().backward()
        return w.grad.numpy()

    say.exercise(
        "**1.** `dw_1` is the gradient of the weights `w` before BatchNorm (eps = 0). What is it, `dw`, at the weights "
        "`4 * w`?",
        "**1.** `dw_1`은 배치 정규화(eps = 0) 앞의 가중치 `w`의 그래디언트입니다. 가중치가 `4 * w`라면 그래디언트 `dw`는 얼마일까요?",
        one,
        "dw = dw_1 / 4",
        expects(dw=gradient_at(4)),
        w=w_0, x=x_1, g=g_1, dw_1=gradient_at(1),
    )  # fmt: skip
    return


@app.cell
def _(say, titanic, two):
    gains = (titanic[1] - titanic[0])[:5]
    ends = interval(gains)
    say.exercise(
        "**2.** `gains` holds five differences on Titanic. Compute the ends `low` and `high` of the 95 % interval of their mean: "
        "mean ± t · s / √n, where s is the unbiased standard deviation and t = 2.776 for five values.",
        "**2.** `gains`에는 타이타닉에서 얻은 차이 다섯 개가 들어 있습니다. 평균의 95 % 구간의 양 끝 `low`와 `high`를 구하세요. "
        "구간은 평균 ± t · s / √n이고, s는 불편 표준편차, 값이 다섯 개일 때 t = 2.776입니다.",
        two,
        "half = 2.776 * gains.std(ddof=1) / len(gains) ** 0.5\nlow, high = gains.mean() - half, gains.mean() + half",
        expects(low=ends.low, high=ends.high),
        gains=gains,
    )
    return


@app.cell
def _(say):
    say.next("lesson_6_write_your_own", "6. Write your own", "직접 만들기")
    return


if __name__ == "__main__":
    app.run()
