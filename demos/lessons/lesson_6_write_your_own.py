# /// script
# [tool.marimo.opengraph]
# title = "6. Write your own"
# description = "직접 만들기"
# ///
import marimo

app = marimo.App(app_title="6. Write your own / 직접 만들기", css_file="lessons.css")

with app.setup:
    import time

    import marimo as mo
    import numba
    import numpy as np
    from common import Say, editor, expects, language_switch, missing, table
    from tinygrad_bn_kernels import kernel

    from tinygrad_bn import Tensor, fused, primitive, testing
    from tinygrad_bn import functional as F
    from tinygrad_bn.backend import kernels_disabled
    from tinygrad_bn.sample import REAL, elementwise

    RULE = """@primitive(
    lambda g, y, x: g * (1 - x * x) / (1 + x * x),
    formula="y = x / (1 + x²)",
    sample=elementwise(REAL),
)
def serpentine(x):
    return x / (1 + x * x)
"""
    LAYER = """@fused(formula="y = (x − mean) / √(var + eps), over the last axis", sample=rows)
def own_layer_norm(x, *, eps):
    return x
"""


@app.cell
def _():
    # All controls are made here, so that they keep their values when the language changes.
    language = language_switch()
    r_max = mo.ui.slider(1, 3, 0.25, value=3, label="r max", show_value=True)
    d_max = mo.ui.slider(0, 5, 0.25, value=5, label="d max", show_value=True)
    rows_count = mo.ui.slider(steps=[32, 128, 500, 2000], value=500, label="N", show_value=True)
    one, two = editor(RULE, checked=True), editor(LAYER)
    language
    return d_max, language, one, r_max, rows_count, two


@app.cell
def _(language):
    say = Say(language)
    say(
        r"""
        # 6. Write your own

        An op, a normalisation, and a kernel for it. Each is one declaration, and `testing.check_op` grades it as it grades
        the engine's own ops. It takes about 15 minutes.
        """,
        r"""
        # 6. 직접 만들기

        연산 하나, 정규화 하나, 그리고 그 커널을 만듭니다. 셋 다 선언 하나면 됩니다. `testing.check_op`이 엔진 자체의 연산과
        똑같은 기준으로 채점합니다. 15분쯤 걸립니다.
        """,
    )
    return (say,)


@app.cell
def _(one, say):
    def graded(name):
        def check(variables):
            if wrong := missing(variables, name):
                return wrong
            if not hasattr(variables[name], "op"):
                return (
                    f"{name} is no op yet: keep the line with @ above its def.",
                    f"{name}은 아직 연산이 아닙니다. def 위의 @ 줄을 남겨 두세요.",
                )
            try:
                testing.check_op(variables[name])
            except AssertionError as error:
                text = "\n".join([str(error), *getattr(error, "__notes__", [])])
                return (
                    f"check_op found a mistake. `gradient` is what your rule gives, `numerical` a difference:\n{text}",
                    f"check_op이 틀린 곳을 찾았습니다. gradient는 규칙의 값, numerical은 수치 미분입니다.\n{text}",
                )
            return None

        return check

    say.exercise(
        r"""
        ## A primitive, and the first exercise

        A *primitive* has a forward on arrays, and one gradient rule for each operand. The rule gets the cotangent g, the result
        y and the operands, and is written in tensor arithmetic: so the engine can differentiate the rule as well, and second
        derivatives need no code. `sample` says which operands the tests draw.

        **1.** The rule below is wrong. Read what the engine says, and mend it. (Quotient rule: $(u/v)' = (u'v - uv')/v^2$.)
        """,
        r"""
        ## 기본 연산(primitive), 그리고 연습 문제 1

        *primitive*에는 배열을 계산하는 순전파와, 피연산자마다 하나씩 그래디언트 규칙이 있습니다. 규칙은 코탄젠트 g, 결과 y,
        피연산자를 받고, 텐서 연산으로 적습니다. 그래서 엔진이 규칙 자체도 미분할 수 있고, 2차 미분에 코드가 더 필요하지
        않습니다. `sample`은 시험할 때 어떤 피연산자를 뽑을지 정합니다.

        **1.** 아래 규칙은 틀렸습니다. 엔진이 하는 말을 읽고 고쳐 보세요. (몫의 미분: $(u/v)' = (u'v - uv')/v^2$)
        """,
        one,
        RULE.replace("/ (1 + x * x),\n", "/ (1 + x * x) ** 2,\n"),
        graded("serpentine"),
        primitive=primitive, elementwise=elementwise, REAL=REAL, F=F,
    )  # fmt: skip
    return (graded,)


@app.cell
def _(say):
    say(
        r"""
        ## A composition: batch renormalisation

        In training BatchNorm uses the batch's mean and deviation, in evaluation the running ones (lesson 4). With small batches
        the two differ a lot. Ioffe (2017) lets training use the running ones too, by a correction of $\hat x$:

        $$y = \hat x\cdot r + d \qquad r = \frac{\sigma_B}{\sigma} \qquad d = \frac{\mu_B - \mu}{\sigma}$$

        Put $\hat x = (x - \mu_B)/\sigma_B$ in: y = (x − μ)/σ, what evaluation computes, but for eps. The trick is that r and d count
        as **constants** in the backward pass, so the gradient keeps the four paths of BatchNorm. And both are clipped, $r$ to
        $[1/r_{max}, r_{max}]$ and d to $\pm d_{max}$. Training begins with $r_{max}$ = 1 and $d_{max}$ = 0, which is BatchNorm,
        and lets them grow.

        A *composition* is an ordinary function of tensors; its gradient needs no code. The nine steps of BatchNorm are already
        there, so it is two lines. `@fused` makes it an op, with its name, its tests, and room for a kernel:

        ```python
        @fused(formula="y = x̂ · r + d", sample=for_renorm)
        def batch_renorm(x, r, d, *, eps):
            steps = F.batch_norm_steps(x, eps=eps)
            return F.astype(steps.xhat * r + d, dtype=x.dtype)
        ```

        """,
        r"""
        ## 합성 연산: 배치 재정규화(batch renormalization)

        배치 정규화는 학습할 때 배치의 평균과 표준편차를, 평가할 때 이동 통계량을 씁니다(4과). 배치가 작으면 둘이 많이 다릅니다.
        Ioffe(2017)는 $\hat x$를 보정해서 학습할 때도 이동 통계량을 쓰게 했습니다.

        $$y = \hat x\cdot r + d \qquad r = \frac{\sigma_B}{\sigma} \qquad d = \frac{\mu_B - \mu}{\sigma}$$

        $\hat x = (x - \mu_B)/\sigma_B$를 넣어 보면 y = (x − μ)/σ, 곧 eps의 영향을 빼면 평가할 때의 계산과 똑같습니다. 요령은 역전파에서 r과 d를
        **상수**로 보는 것입니다. 그래서 그래디언트에는 배치 정규화의 네 경로가 그대로 남습니다. 또 r은
        $[1/r_{max}, r_{max}]$로, d는 $\pm d_{max}$로 자릅니다. 학습은 $r_{max}$ = 1, $d_{max}$ = 0에서 시작해(이때는 배치
        정규화와 같습니다) 점점 키웁니다.

        *합성 연산*은 텐서를 다루는 보통 함수이고, 그래디언트를 위한 코드가 필요 없습니다. 배치 정규화의 아홉 단계는 이미 있으니 두
        줄이면 됩니다. `@fused`를 붙이면 이름과 시험이 있는 연산이 되고, 커널을 붙일 자리도 생깁니다.

        ```python
        @fused(formula="y = x̂ · r + d", sample=for_renorm)
        def batch_renorm(x, r, d, *, eps):
            steps = F.batch_norm_steps(x, eps=eps)
            return F.astype(steps.xhat * r + d, dtype=x.dtype)
        ```

        """,
    )
    return


@app.cell
def _():
    def for_renorm(d):
        n, c = d.integer(2, 6), d.integer(1, 4)
        vectors = d.array(REAL, (c,)), d.array(REAL, (c,))
        return (d.array(REAL, (n, c)), *vectors), {"eps": d.choice([0.3, 0.7])}

    @fused(formula="y = x̂ · r + d", sample=for_renorm)
    def batch_renorm(x, r, d, *, eps):
        """Batch renormalisation (Ioffe 2017) of x (N, C), with r and d of shape (C,)."""
        steps = F.batch_norm_steps(x, eps=eps)
        return F.astype(steps.xhat * r + d, dtype=x.dtype)

    with kernels_disabled():  # without the kernel that follows: this process may have registered it already
        composed_report = str(testing.check_op(batch_renorm))
    return batch_renorm, composed_report


@app.cell
def _(composed_report, d_max, r_max, say):
    say(
        r"""
        The engine's report: `[[report]]`. It has compared values, gradients and second derivatives with differences, in
        float32 and float64, for operands of many shapes.

        Now a batch of four. The running mean is 3 and the running deviation 2:

        [[r_max]]

        [[d_max]]
        """,
        r"""
        엔진의 보고입니다: `[[report]]`. 값, 그래디언트, 2차 미분을 수치 미분과 비교했고, float32와 float64, 여러 모양의 피연산자로
        시험했습니다.

        이제 크기가 4인 배치를 넣어 봅시다. 이동 평균은 3, 이동 표준편차는 2입니다.

        [[r_max]]

        [[d_max]]
        """,
        report=composed_report, r_max=r_max, d_max=d_max,
    )  # fmt: skip
    return


@app.cell
def _(batch_renorm, d_max, r_max, say):
    batch = np.array([[4.0], [7.5], [5.0], [6.5]])
    g = np.array([[1.0], [-0.5], [0.25], [2.0]])
    mean, std = 3.0, 2.0
    r = np.clip(batch.std(axis=0) / std, 1 / r_max.value, r_max.value)
    d = np.clip((batch.mean(axis=0) - mean) / std, -d_max.value, d_max.value)

    def run(f):
        t = Tensor(batch, requires_grad=True)
        y = f(t)
        y.backward(g)
        return y.numpy()[:, 0], t.grad.numpy()[:, 0]

    plain, d_plain = run(lambda t: F.batch_norm(t, training=True, eps=1e-5))
    renormed, d_renormed = run(lambda t: batch_renorm(t, r, d, eps=1e-5))
    evaluated, d_evaluated = run(lambda t: F.batch_norm(t, np.array([mean]), np.array([std**2]), eps=1e-5))
    mo.vstack([
        table({
            "BatchNorm, train": plain, "renorm": renormed, "BatchNorm, eval": evaluated,
            "∂x, train": d_plain, "∂x, renorm": d_renormed, "∂x, eval": d_evaluated,
        }),
        say(
            r"""
            r = [[r]] and d = [[d]]. Batch renormalisation and evaluation differ by [[off]] at most. Its gradient is r times
            that of BatchNorm (largest difference [[off_grad]]), and not that of evaluation: it still sums to 0.
            """,
            r"""
            r = [[r]], d = [[d]]입니다. 배치 재정규화의 출력과 평가 모드의 출력은 최대 [[off]]만큼 다릅니다. 그래디언트는 배치
            정규화의 r배이고(가장 큰 차이 [[off_grad]]), 평가 모드의 그래디언트와는 다릅니다. 배치 전체의 합이 여전히 0입니다.
            """,
            r=r[0], d=d[0], off=np.abs(renormed - evaluated).max(), off_grad=np.abs(d_renormed - r * d_plain).max(),
        ),
    ])  # fmt: skip
    return


@app.cell
def _(batch_renorm):
    @numba.njit(cache=False)
    def renorm_rows(x, r, d, eps, y):
        n, channels = x.shape
        for c in range(channels):
            mu = 0.0
            for i in range(n):
                mu += x[i, c]
            mu /= n
            var = 0.0
            rest = 0.0
            for i in range(n):
                rest += x[i, c] - mu
                var += (x[i, c] - mu) ** 2
            rest /= n  # what rounding left of the mean
            var = var / n - rest * rest
            scale = r[c] / np.sqrt(var + eps)
            for i in range(n):
                y[i, c] = (x[i, c] - mu - rest) * scale + d[c]

    @kernel("batch_renorm", "cpu")
    def batch_renorm_kernel(x, r, d, *, eps):
        alike = all(v.dtype == x.dtype and v.shape == x.shape[1:] for v in (r, d))
        if not (x.size and x.dtype.char in "fd" and alike):
            return NotImplemented  # the composition runs instead
        y = np.empty(x.shape, x.dtype)
        renorm_rows(x, r, d, eps, y)
        return y

    kernel_report = str(testing.check_op(batch_renorm))
    return (kernel_report,)


@app.cell
def _(kernel_report, rows_count, say):
    say(
        r"""
        ## A kernel

        The composition makes an array at each of its steps. A loop does it in one pass, compiled by Numba:

        ```python
        @kernel("batch_renorm", "cpu")
        def batch_renorm_kernel(x, r, d, *, eps):
            alike = all(v.dtype == x.dtype and v.shape == x.shape[1:] for v in (r, d))
            if not (x.size and x.dtype.char in "fd" and alike):
                return NotImplemented  # the composition runs instead
            y = np.empty(x.shape, x.dtype)
            renorm_rows(x, r, d, eps, y)  # the loop, under numba.njit: mean, variance, output
            return y
        ```

        It has the op's name, so the engine finds it, and `check_op` compares it with the composition:
        `[[report]]`. The backward pass goes through the composition, for there is no `batch_renorm.vjp`. Here is
        the time of the forward pass, for N × 256 values in float32:

        [[rows_count]]
        """,
        r"""
        ## 커널

        합성 연산은 단계마다 배열을 하나씩 만듭니다. Numba로 컴파일한 반복문은 이 일을 한 번에 합니다.

        ```python
        @kernel("batch_renorm", "cpu")
        def batch_renorm_kernel(x, r, d, *, eps):
            alike = all(v.dtype == x.dtype and v.shape == x.shape[1:] for v in (r, d))
            if not (x.size and x.dtype.char in "fd" and alike):
                return NotImplemented  # 대신 합성 연산이 실행된다
            y = np.empty(x.shape, x.dtype)
            renorm_rows(x, r, d, eps, y)  # numba.njit을 붙인 반복문: 평균, 분산, 출력
            return y
        ```

        연산과 이름이 같아서 엔진이 찾아 쓰고, `check_op`은 합성 연산의 결과와 비교합니다: `[[report]]`. `batch_renorm.vjp`는
        없으므로 역전파는 합성 연산으로 합니다. 이제 float32 값 N × 256개로 순전파 시간을 재 봅시다.

        [[rows_count]]
        """,
        report=kernel_report, rows_count=rows_count,
    )  # fmt: skip
    return


@app.cell
def _(batch_renorm, kernel_report, rows_count):
    assert kernel_report  # the kernel is compiled
    data = np.random.default_rng(0).normal(3, 2, (rows_count.value, 256)).astype(np.float32)
    ones = np.ones(256, np.float32)

    def fastest(f):
        times = []
        for _ in range(10):
            began = time.perf_counter()
            f()
            times.append(time.perf_counter() - began)
        return min(times) * 1e3

    by_kernel = fastest(lambda: batch_renorm(data, ones, ones, eps=1e-5))
    by_steps = fastest(lambda: batch_renorm.composition(data, ones, ones, eps=1e-5))
    return by_kernel, by_steps


@app.cell
def _(by_kernel, by_steps, say):
    mo.vstack([
        table(
            {say.pick("composition", "합성 연산"): by_steps, say.pick("kernel", "커널"): by_kernel},
            head=("", "ms"),
        ),
        say(
            r"""
            The kernel takes [[ratio:.2g]] times as long as the composition, on this machine and now. It walks down the columns
            of a row-major array, which is the slow way through memory; the engine's own kernels work on chunks of rows.
            """,
            r"""
            지금 이 컴퓨터에서 커널의 시간은 합성 연산의 [[ratio:.2g]]배입니다. 이 커널은 행 우선으로 저장된 배열을 열을 따라
            내려가며 읽는데, 메모리를 읽는 순서로는 느린 쪽입니다. 엔진의 커널은 여러 행을 한 묶음으로 처리합니다.
            """,
            ratio=by_kernel / by_steps,
        ),
    ])  # fmt: skip
    return


@app.cell
def _(graded, say, two):
    def rows(d):
        return (d.array(REAL, (d.integer(1, 5), d.integer(2, 6))),), {"eps": d.choice([0.3, 0.7])}

    x = np.random.default_rng(5).normal(size=(4, 6))
    right = F.layer_norm(Tensor(x), 6, eps=1e-5).numpy()

    def is_layer_norm(variables):
        if not hasattr(variables.get("own_layer_norm"), "op"):
            return graded("own_layer_norm")(variables)  # which says what is missing
        y = variables["own_layer_norm"](x, eps=1e-5)
        return expects(y=right)({"y": y}) or graded("own_layer_norm")(variables)

    say.exercise(
        r"""
        ## The second exercise: LayerNorm

        LayerNorm takes mean and variance of each *sample* over its features, instead of each feature over the batch. So it needs
        no batch and no running statistics, and is the same in training and evaluation. The backward pass has the same four
        paths, along the other axis: there the gradients of one sample sum to 0, and samples do not affect each other.

        **2.** Write it as a composition, with `F.mean(x, axis=-1, keepdims=True)` and `F.sqrt`. No rule is needed.
        """,
        r"""
        ## 연습 문제 2: 층 정규화(LayerNorm)

        층 정규화(LayerNorm)는 배치에서 특성(feature)마다가 아니라 *샘플*마다 특성들의 평균과 분산을 구합니다. 그래서 배치도 이동 통계량도
        필요 없고, 학습할 때와 평가할 때가 같습니다. 역전파의 네 경로도 같지만 방향이 다릅니다. 한 샘플 안에서 그래디언트의 합이
        0이 되고, 샘플끼리는 서로 영향을 주지 않습니다.

        **2.** `F.mean(x, axis=-1, keepdims=True)`와 `F.sqrt`를 써서 합성 연산으로 만들어 보세요. 규칙은 필요 없습니다.
        """,
        two,
        LAYER.replace(
            "    return x\n",
            "    xmu = x - F.mean(x, axis=-1, keepdims=True)\n"
            "    return xmu / F.sqrt(F.mean(xmu * xmu, axis=-1, keepdims=True) + eps)\n",
        ),
        is_layer_norm,
        fused=fused, rows=rows, F=F,
    )  # fmt: skip
    return


@app.cell
def _(say):
    say(
        r"""
        ## Where next

        `python -m demos quiz` asks you for every gradient of BatchNorm. `python -m demos bn_backward --x 1 2 3 4 6` prints them
        for your own numbers, and `e.html("steps.html")` draws them for your own network. `demos/lessons/questions.md` answers
        what others asked.
        """,
        r"""
        ## 다음에 볼 것

        `python -m demos quiz`는 배치 정규화의 그래디언트를 하나씩 물어봅니다. `python -m demos bn_backward --x 1 2 3 4 6`은 여러분의
        숫자로 모든 값을 출력하고, `e.html("steps.html")`은 여러분의 신경망으로 그림을 그립니다. 다른 사람들이 물어본 것은
        `demos/lessons/questions.ko.md`에 답이 있습니다.
        """,
    )
    return


if __name__ == "__main__":
    app.run()
