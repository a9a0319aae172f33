# /// script
# [tool.marimo.opengraph]
# title = "4. Train and eval"
# description = "학습 모드와 평가 모드"
# ///
import marimo

app = marimo.App(app_title="4. Train and eval / 학습 모드와 평가 모드", css_file="lessons.css")

with app.setup:
    import marimo as mo
    import numpy as np
    from common import Say, editor, expects, language_switch, picture, table, written

    from tinygrad_bn import Tensor, datasets, manual_seed, nn, optim, train, viz
    from tinygrad_bn.train.interval import interval


@app.cell
def _():
    # All controls are made here, so that they keep their values when the language changes.
    language = language_switch()
    momentum = mo.ui.slider(0.01, 0.5, 0.01, value=0.1, label="momentum", show_value=True)
    batches = mo.ui.slider(1, 60, 1, value=8, label="n", show_value=True)
    size = mo.ui.slider(2, 8, 1, value=5, label="N", show_value=True)
    epochs = mo.ui.slider(1, 8, 1, value=1, label="epochs", show_value=True)
    batch_size = mo.ui.slider(
        steps=[4, 8, 20, 50, 100, 250, 500], value=250, label="batch size / 배치 크기", show_value=True
    )
    one = editor("# a, b: (4, 2)\nrunning_mean = np.zeros(2)\nrunning_var = np.ones(2)")
    two = editor("# x, g: (4, 2)\n# running_mean, running_var, weight: (2,)\ndx = g")
    language
    return batch_size, batches, epochs, language, momentum, one, size, two


@app.cell
def _(language):
    say = Say(language)
    say(
        r"""
        # 4. Train and eval

        BatchNorm is two functions in one. In training mode the statistics of the batch normalise it. In evaluation mode
        the running statistics do. Most surprises with BatchNorm come from the difference. It takes about 15 minutes.
        """,
        r"""
        # 4. 학습 모드와 평가 모드

        배치 정규화는 한 레이어에 들어 있는 두 개의 함수입니다. 학습할 때(train)는 그 배치의 평균과 분산으로, 평가할 때(eval)는
        저장해 둔 이동 평균과 이동 분산으로 정규화합니다. 배치 정규화를 쓰다 당황하는 일은 대부분 이 차이에서 생깁니다. 15분쯤
        걸립니다.
        """,
    )
    return (say,)


@app.cell
def _(batches, momentum, say):
    say(
        r"""
        ## Running statistics

        At evaluation a sample must not depend on which others happen to be in its batch. So during training the layer
        remembers a moving average of what it has seen:

        $$\text{running} \leftarrow (1 - m)\cdot\text{running} + m\cdot\text{batch}$$

        It begins with mean 0 and variance 1. Here batches of 32 come from data with mean 3 and standard deviation 2.

        [[momentum]]

        Batches seen: [[batches]]
        """,
        r"""
        ## 이동 평균과 이동 분산 (running statistics)

        평가할 때 한 샘플의 결과가 같은 배치에 우연히 들어온 다른 샘플에 따라 달라지면 곤란합니다. 그래서 학습하는 동안 레이어는
        지금까지 본 배치들의 통계량을 이동 평균으로 기억해 둡니다.

        $$\text{running} \leftarrow (1 - m)\cdot\text{running} + m\cdot\text{batch}$$

        시작값은 평균 0, 분산 1입니다. 여기서는 평균 3, 표준편차 2인 데이터에서 크기 32인 배치를 뽑습니다.

        [[momentum]]

        지금까지 본 배치 수: [[batches]]
        """,
        momentum=momentum, batches=batches,
    )  # fmt: skip
    return


@app.cell
def _(batches, momentum, say):
    layer = nn.BatchNorm1d(1, momentum=momentum.value)
    rng = np.random.default_rng(0)
    means, variances = [0.0], [1.0]
    for _ in range(60):
        layer(Tensor(rng.normal(3, 2, (32, 1)), dtype=np.float32))
        means.append(float(layer.running_mean.numpy()[0]))
        variances.append(float(layer.running_var.numpy()[0]))
    figure, ((axes,),) = viz.subplots(1, 1, 4.8, 3)
    axes.plot(means, color=viz.COLOURS[1], label=say.pick("running mean", "이동 평균"))
    axes.plot(variances, color=viz.COLOURS[0], label=say.pick("running variance", "이동 분산"))
    axes.hlines([3, 4], 0, 60, color="0.5", linestyle=":")
    axes.axvline(batches.value, color="0.5", linewidth=1)
    axes.set(xlabel=say.pick("batches", "배치 수"), ylim=(0, 5))
    viz.legend_below(axes)
    keras = nn.BatchNorm1d.keras(1)
    mo.vstack([
        picture(figure, say.pick("Running mean and variance approach 3 and 4", "이동 평균과 이동 분산이 3과 4에 다가간다")),
        say(
            r"""
            After [[n]] batches the running mean is [[mean]] and the running variance [[var]]. In theory they have gone
            $1-(1-m)^n$ = [[share]] of the way. A small momentum is slow, a large one noisy.

            **Two conventions.** Here and in PyTorch the momentum is the weight of the *new* batch, usually 0.1. In Keras it
            is the weight of the *old* value, usually 0.99; so Keras' default is our [[keras]], ten times slower than
            PyTorch's. `nn.BatchNorm1d.keras(1)` says so: `[[shown]]`.
            """,
            r"""
            배치를 [[n]]개 본 뒤의 이동 평균은 [[mean]], 이동 분산은 [[var]]입니다. 이론대로라면 목표까지
            $1-(1-m)^n$ = [[share]]만큼 다가갔습니다. momentum이 작으면 느리고, 크면 배치마다 흔들립니다.

            **두 가지 관례.** 여기와 PyTorch에서 momentum은 *새* 배치의 비중이고 보통 0.1입니다. Keras에서는 *이전* 값의
            비중이고 보통 0.99입니다. 그래서 Keras의 기본값은 여기의 [[keras]]에 해당하며, PyTorch의 기본값보다 열 배
            느립니다. `nn.BatchNorm1d.keras(1)`을 출력해 보면 알 수 있습니다: `[[shown]]`
            """,
            n=batches.value, mean=means[batches.value], var=variances[batches.value],
            share=1 - (1 - momentum.value) ** batches.value, keras=keras.momentum, shown=repr(keras),
        ),
    ])  # fmt: skip
    return


@app.cell
def _(say, size):
    say(
        r"""
        ## The same samples, twice; and a batch of one

        Both modes get the same first sample. In training mode its output depends on the rest of the batch:

        [[size]]
        """,
        r"""
        ## 같은 샘플을 두 모드로, 그리고 크기 1인 배치

        두 모드에 똑같은 첫 샘플을 넣습니다. 학습 모드의 출력은 같은 배치에 누가 있느냐에 따라 달라집니다.

        [[size]]
        """,
        size=size,
    )
    return


@app.cell
def _(say, size):
    bn = nn.BatchNorm1d(1)
    bn.load_state_dict({**bn.state_dict(), "running_mean": [3.0], "running_var": [4.0]})
    x = np.array([[4.0], [1.0], [6.0], [2.5], [3.5], [9.0], [-2.0], [5.0]], np.float32)[: size.value]
    in_eval = bn.eval()(Tensor(x)).numpy()[:, 0]
    alone = bn(Tensor(x[:1])).numpy()[0, 0]
    in_train = bn.train()(Tensor(x)).numpy()[:, 0]
    refusal = ""
    try:
        bn(Tensor(x[:1]))
    except ValueError as error:
        refusal = str(error)
    mo.vstack([
        table({"x": x[:, 0], "train()": in_train, "eval()": in_eval}, spec=".3f"),
        say(
            r"""
            In evaluation mode the first sample alone gives [[alone]] again. In training mode a batch of one is impossible:
            its mean is the value itself, so $\hat x$ = 0 whatever the value is, and nothing could be learned. The engine
            refuses, and says what to do:

            > [[refusal]]
            """,
            r"""
            평가 모드에서는 첫 샘플 하나만 넣어도 그대로 [[alone]]입니다. 학습 모드에서는 크기가 1인 배치를 쓸 수 없습니다.
            평균이 자기 자신이라 값이 무엇이든 $\hat x$ = 0이 되어 아무것도 배울 수 없기 때문입니다. 엔진은 계산을 거절하고
            해결 방법을 알려 줍니다. 메시지는 영어이지만 뜻은 이렇습니다. 채널마다 값이 둘 이상 있어야 하니, 작은 마지막 배치를
            버리거나(`drop_last=True`), `eval()`로 이동 통계량을 쓰거나, `freeze()`로 이 레이어를 고정하세요.

            > [[refusal]]
            """,
            alone=alone, refusal=refusal,
        ),
    ])  # fmt: skip
    return


@app.cell
def _(say):
    rng_g = np.random.default_rng(2)
    sample, g = rng_g.normal(3, 2, (5, 1)), rng_g.normal(size=(5, 1))
    gradients = {}
    for mode in ("train", "eval"):
        network = nn.BatchNorm1d(1).astype(np.float64)
        network.load_state_dict({**network.state_dict(), "running_mean": [3.0], "running_var": [4.0]})
        t = Tensor(sample, requires_grad=True)
        getattr(network, mode)()(t).backward(g)
        gradients[mode] = t.grad.numpy()[:, 0]
    mo.vstack([
        say(
            r"""
            ## The gradient in evaluation mode

            In training mode x acts on μ and σ² too, so its gradient has four paths (lesson 3). In evaluation mode the
            running statistics are constants. One path is left, and each sample is on its own:

            $$\frac{\partial L}{\partial x_i} = \frac{\gamma\, g_i}{\sqrt{\text{running var} + \varepsilon}}$$
            """,
            r"""
            ## 평가 모드의 그래디언트

            학습 모드에서는 x가 μ와 σ²에도 영향을 주므로 그래디언트의 경로가 네 개입니다(3과). 평가 모드에서는 이동 평균과 이동
            분산이 상수입니다. 경로는 하나만 남고, 샘플끼리 서로 영향을 주지 않습니다.

            $$\frac{\partial L}{\partial x_i} = \frac{\gamma\, g_i}{\sqrt{\text{running var} + \varepsilon}}$$
            """,
        ),
        table({"g": g[:, 0], "∂x, train()": gradients["train"], "∂x, eval()": gradients["eval"]}),
        say(
            r"""
            The sum of ∂x over the batch is [[train_sum]] in training mode and [[eval_sum]] in evaluation mode. Anyone who
            fine-tunes with frozen BatchNorm trains with the second gradient.
            """,
            r"""
            배치 전체에 대한 ∂x의 합은 학습 모드에서 [[train_sum]], 평가 모드에서 [[eval_sum]]입니다. 배치 정규화를 고정하고
            미세 조정(fine-tuning)을 하면 두 번째 그래디언트로 학습하게 됩니다.
            """,
            train_sum=gradients["train"].sum().round(12) + 0.0, eval_sum=gradients["eval"].sum(),
        ),
    ])  # fmt: skip
    return


@app.cell
def _(batch_size, epochs, say):
    say(
        r"""
        ## The gap meter

        Why is validation behind in the first epoch, though training goes well? Train 784-64-64-10 on 2,000 digits of MNIST
        with Adam, for five seeds. `train.statistics_gap` scores the same 1,000 held-out digits twice: with statistics of
        batches, and with the running ones. Nothing else differs. `train.recalibrate` then replaces the running statistics
        by those of the training data.

        [[epochs]]

        [[batch_size]]
        """,
        r"""
        ## 두 통계량의 차이 재기

        학습은 잘 되는데 왜 첫 epoch의 검증 정확도는 뒤처질까요? MNIST 숫자 2,000장으로 784-64-64-10 신경망을 Adam으로,
        시드 다섯 개로 학습합니다. `train.statistics_gap`은 학습에 쓰지 않은 숫자 1,000장을 두 번 채점합니다. 한 번은 배치의
        통계량으로, 한 번은 이동 통계량으로 정규화하고 나머지는 모두 같습니다. 그다음 `train.recalibrate`가 이동 통계량을 학습 데이터
        전체에서 다시 구한 값으로 바꿉니다.

        [[epochs]]

        [[batch_size]]
        """,
        epochs=epochs, batch_size=batch_size,
    )  # fmt: skip
    return


@app.cell
def _(batch_size, epochs):
    digits, held_out = datasets.load("mnist5k").scaled().split(1000, seed=0)
    training = digits.take(np.arange(2000))

    def scores(seed):
        manual_seed(seed)
        layers = [nn.Flatten(), nn.Linear(784, 64), nn.BatchNorm1d(64), nn.ReLU()]
        net = nn.Sequential(*layers, nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
        options = {"epochs": epochs.value, "batch_size": batch_size.value, "seed": seed, "progress": False}
        train.fit(net, training, optimizer=optim.Adam(net.parameters(), lr=1e-3), **options)
        gap = train.statistics_gap(net, held_out, batch_size=batch_size.value)
        train.recalibrate(net, training)
        return gap.batch.accuracy, gap.running.accuracy, train.evaluate(net, held_out).accuracy

    by_batch, by_running, recalibrated = np.array([scores(seed) for seed in range(5)]).T
    steps = epochs.value * -(-len(training) // batch_size.value)
    return by_batch, by_running, recalibrated, steps


@app.cell
def _(by_batch, by_running, recalibrated, say, steps):
    mo.vstack([
        table(
            {
                say.pick("batch statistics", "배치의 통계량"): [written(interval(by_batch))],
                say.pick("running statistics", "이동 통계량"): [written(interval(by_running))],
                say.pick("recalibrated", "recalibrate 후"): [written(interval(recalibrated))],
            },
            head=("", say.pick("accuracy, 95 % interval", "정확도, 95 % 구간")),
        ),
        say(
            r"""
            These are [[steps]] steps, so the running statistics have gone [[share]] of the way. The gap between the first
            two rows is [[gap]] (mean of five seeds and 95 % interval). If the interval is far from 0, the weights are fine
            and the running statistics are late: train longer, use a larger momentum, or recalibrate. Small batches make
            another gap: their own statistics are noisy, and then the running ones are the better.
            """,
            r"""
            지금까지 [[steps]]번 갱신했고, 이동 통계량은 목표까지 [[share]]만큼 다가갔습니다. 앞의 두 줄의 차이는
            [[gap]]입니다(시드 다섯 개의 평균과 95 % 구간). 이 구간이 0에서 멀다면 가중치에는 문제가 없고 이동 통계량이 늦은
            것입니다. 더 오래 학습하거나, momentum을 키우거나, recalibrate를 쓰세요. 배치가 작으면 반대의 차이가 생깁니다. 배치
            자체의 통계량이 흔들리기 때문에 이동 통계량 쪽이 더 낫습니다.
            """,
            steps=steps, share=1 - 0.9**steps, gap=interval(by_batch - by_running),
        ),
    ])  # fmt: skip
    return


@app.cell
def _(say):
    say("## Exercises", "## 연습 문제")
    return


@app.cell
def _(one, say):
    a, b = np.random.default_rng(3).normal(3, 2, (2, 4, 2))
    fresh = nn.BatchNorm1d(2).astype(np.float64)
    for batch in (a, b):
        fresh(Tensor(batch))
    say.exercise(
        "**1.** A new layer (momentum 0.1) sees the batches `a` and `b`. What are its running mean and variance? "
        "Remember which of the two variances is stored.",
        "**1.** 새 레이어(momentum 0.1)가 배치 `a`와 `b`를 차례로 봅니다. 이동 평균과 이동 분산을 구하세요. 두 분산 가운데 "
        "어느 것이 저장되는지 떠올려 보세요.",
        one,
        """
running_mean, running_var = np.zeros(2), np.ones(2)
for batch in (a, b):
    running_mean = 0.9 * running_mean + 0.1 * batch.mean(axis=0)
    running_var = 0.9 * running_var + 0.1 * batch.var(axis=0, ddof=1)
""",
        expects(running_mean=fresh.running_mean.numpy(), running_var=fresh.running_var.numpy()),
        a=a, b=b,
    )  # fmt: skip
    return a, b, fresh


@app.cell
def _(a, b, fresh, say, two):
    given = {"weight": np.array([1.5, -0.5]), "bias": np.zeros(2)}
    fixed = nn.BatchNorm1d(2).astype(np.float64).eval()
    fixed.load_state_dict({**fresh.state_dict(), **given})
    x_eval = Tensor(a, requires_grad=True)
    fixed(x_eval).backward(b)
    say.exercise(
        "**2.** The layer is in evaluation mode, and `g` arrives at its output. Compute `dx`, the gradient of `x`.",
        "**2.** 레이어가 평가 모드이고 출력에 그래디언트 `g`가 들어옵니다. `x`의 그래디언트 `dx`를 구하세요.",
        two,
        "dx = g * weight / np.sqrt(running_var + eps)",
        expects(dx=x_eval.grad.numpy()),
        x=a, g=b, weight=given["weight"], eps=fixed.eps,
        running_mean=fixed.running_mean.numpy(), running_var=fixed.running_var.numpy(),
    )  # fmt: skip
    return


@app.cell
def _(say):
    say.next(
        "lesson_5_when_it_helps",
        "5. When BatchNorm helps, and when it does not",
        "배치 정규화는 언제 도움이 되고 언제 되지 않나",
    )
    return


if __name__ == "__main__":
    app.run()
