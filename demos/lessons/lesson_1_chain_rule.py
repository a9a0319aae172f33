# /// script
# [tool.marimo.opengraph]
# title = "1. The chain rule as a machine"
# description = "연쇄 법칙이라는 기계"
# ///
import marimo

app = marimo.App(app_title="1. The chain rule as a machine / 연쇄 법칙이라는 기계", css_file="lessons.css")

with app.setup:
    import marimo as mo
    import numpy as np
    from common import Say, editor, expects, language_switch, picture, table

    from tinygrad_bn import Tensor, grad, viz
    from tinygrad_bn import functional as F

    def parameter(value):
        return Tensor(np.float64(value), requires_grad=True)


@app.cell
def _():
    # All controls are made here, so that they keep their values when the language changes.
    language = language_switch()
    w = mo.ui.slider(-3, 3, 0.1, value=0.8, label="w", show_value=True)
    x = mo.ui.slider(-3, 3, 0.1, value=1.5, label="x", show_value=True)
    b = mo.ui.slider(-3, 3, 0.1, value=-0.5, label="b", show_value=True)
    a = mo.ui.slider(-3, 3, 0.5, value=1, label="a", show_value=True)
    g_1 = mo.ui.slider(-2, 2, 0.5, value=1, label="g₁", show_value=True)
    g_2 = mo.ui.slider(-2, 2, 0.5, value=0, label="g₂", show_value=True)
    g_3 = mo.ui.slider(-2, 2, 0.5, value=0, label="g₃", show_value=True)
    one = editor("# y = tanh(w * x + b)\ndw = 0.0\ndx = 0.0\ndb = 0.0")
    two = editor("# p = u * v; q = exp(u); y = p * q\ndu = 0.0")
    language
    return a, b, g_1, g_2, g_3, language, one, two, w, x


@app.cell
def _(language):
    say = Say(language)
    say(
        r"""
        # 1. The chain rule as a machine

        A network is a long chain of small operations. For each of them the derivative is easy. Autograd remembers the
        operations, and multiplies their derivatives on the way back. You will do the same by hand, and see the numbers
        agree. It takes about ten minutes.
        """,
        r"""
        # 1. 연쇄 법칙이라는 기계

        신경망은 작은 연산을 길게 이어 놓은 것입니다. 연산 하나하나의 미분은 쉽습니다. 자동 미분(autograd)은 어떤 연산을 했는지
        기억해 두었다가, 뒤로 돌아가면서 미분을 차례로 곱합니다. 같은 일을 손으로 해 보고 숫자가 맞는지 확인해 봅시다. 10분쯤
        걸립니다.
        """,
    )
    return (say,)


@app.cell
def _(b, say, w, x):
    say(
        r"""
        ## One neuron, node by node

        $$p = w\,x \qquad s = p + b \qquad y = \tanh s$$

        Move the sliders. Read the values from left to right, and the gradients from right to left. ∂s means $\partial y /
        \partial s$: how much y changes if s changes a little.

        [[w]]

        [[x]]

        [[b]]
        """,
        r"""
        ## 뉴런 하나를 노드별로

        $$p = w\,x \qquad s = p + b \qquad y = \tanh s$$

        슬라이더를 움직여 보세요. 값(순전파)은 왼쪽에서 오른쪽으로, 그래디언트(역전파)는 오른쪽에서 왼쪽으로 읽습니다. ∂s는
        $\partial y / \partial s$, 곧 s가 조금 변할 때 y가 얼마나 변하는지를 뜻합니다.

        [[w]]

        [[x]]

        [[b]]
        """,
        w=w, x=x, b=b,
    )  # fmt: skip
    return


@app.cell
def _(b, say, w, x):
    leaves = {name: parameter(slider.value) for name, slider in (("w", w), ("x", x), ("b", b))}
    p = leaves["w"] * leaves["x"]
    s = p + leaves["b"]
    y = F.tanh(s)
    nodes = {**leaves, "p": p, "s": s, "y": y}
    for node in nodes.values():
        node.retain_grad()
    kept = [f"{t.node.op.name}({', '.join('Tensor' for _ in t.node.inputs)})" for t in (p, s, y)]
    y.backward()
    values = {name: t.item() for name, t in nodes.items()}
    gradients = {name: t.grad.item() for name, t in nodes.items()}
    places = {"w": (0, 2), "x": (0, 1), "b": (1, 0), "p": (1, 1.5), "s": (2, 1), "y": (3, 1)}
    figure, ((axes,),) = viz.subplots(1, 1, 4.8, 3)
    boxes = {
        name: axes.annotate(
            f"{name} = {values[name]:.3f}\n∂{name} = {gradients[name]:.3f}", place, ha="center", va="center",
            bbox={"boxstyle": "round", "facecolor": "none", "edgecolor": "0.6"},
        ).get_bbox_patch()
        for name, place in places.items()
    }  # fmt: skip
    for tail, head in (("w", "p"), ("x", "p"), ("p", "s"), ("b", "s"), ("s", "y")):
        arrow = {"arrowstyle": "-|>", "color": viz.COLOURS[1], "linewidth": 2, "shrinkA": 2, "shrinkB": 3}
        axes.annotate("", places[head], places[tail], arrowprops=arrow | {"patchA": boxes[tail], "patchB": boxes[head]})
    axes.set(xlim=(-0.5, 3.45), ylim=(-0.3, 2.3))
    axes.set_axis_off()
    mo.vstack([
        picture(figure, say.pick("The graph with values and gradients", "값과 그래디언트를 적은 계산 그래프")),
        say(
            r"""
            The machine begins with ∂y = 1. At each node it multiplies by one local derivative:

            - tanh: $\partial s = \partial y\,(1 - y^2)$ = [[ds]]. At s = [[s]] the curve is
              that steep. Make s large: tanh is flat there, and nothing gets through. That is a vanishing gradient.
            - plus hands its gradient on to both: ∂p = ∂b = [[db]].
            - times swaps: $\partial w = \partial p\cdot x$ = [[dw]], and $\partial x = \partial p\cdot w$ = [[dx]].

            Where is the graph? In the results: each computed tensor has a `node`, with the op that made it and the operands.
            Here the nodes were `[[kept]]`. They are freed after the backward pass.
            """,
            r"""
            기계는 ∂y = 1에서 출발합니다. 노드를 지날 때마다 그 연산의 미분 하나를 곱합니다.

            - tanh: $\partial s = \partial y\,(1 - y^2)$ = [[ds]]. s = [[s]]에서 곡선의 기울어진 정도입니다. s를 크게 해 보세요.
              그곳의 tanh는 평평해서 아무것도 전해지지 않습니다. 이것이 그래디언트 소실(vanishing gradient)입니다.
            - 덧셈은 받은 그래디언트를 양쪽에 그대로 넘깁니다: ∂p = ∂b = [[db]].
            - 곱셈은 서로 바꾸어 곱합니다: $\partial w = \partial p\cdot x$ = [[dw]], $\partial x = \partial p\cdot w$ = [[dx]].

            그래프는 계산 결과 안에 있습니다. 연산으로 만들어진 텐서에는 `node`가 있고, 그 안에 연산과 피연산자가 들어
            있습니다. 여기서는 `[[kept]]`였습니다. 역전파가 끝나면 그래프는 해제됩니다.
            """,
            ds=gradients["s"], s=values["s"], db=gradients["b"], dw=gradients["w"], dx=gradients["x"],
            kept=" → ".join(kept),
        ),
    ])  # fmt: skip
    return


@app.cell
def _(a, say):
    say(
        r"""
        ## Why gradients add, and why order matters

        `b = a + a`, then `c = b + b`. Here a reaches c along four paths, each with derivative 1.

        [[a]]
        """,
        r"""
        ## 그래디언트는 왜 더하고, 순서는 왜 중요한가

        `b = a + a`, 그리고 `c = b + b`. a에서 c로 가는 경로는 네 개이고, 경로마다 미분은 1입니다.

        [[a]]
        """,
        a=a,
    )
    return


@app.cell
def _(a, say):
    start = parameter(a.value)
    middle = start + start
    end = middle + middle
    middle.retain_grad()
    end.backward()

    # The same with one mistake: a node passes its gradient on as soon as one arrives, and does not wait for the other.
    hasty = {"a": 0.0, "b": 0.0}
    for _ in range(2):  # c sends 1 to b, twice
        hasty["b"] += 1.0
        for _ in range(2):  # b sends all it has so far to a, each time
            hasty["a"] += hasty["b"]
    square = parameter(a.value)
    (square * square).backward()
    say(
        r"""
        If a changes by a little h, then both operands of `a + a` change by h, and the effects **add**. So do gradients: where
        paths meet on the way back, they are summed. Hence ∂b = [[db]] and ∂a = [[da]]. In $a \cdot a$ both operands are a as
        well, so ∂a = a + a = [[dsq]].

        A node must not hand on its gradient before all of it has arrived. If b did so at once, a would get
        [[hasty]] instead of [[da]]: b's first share would be counted twice. So the engine visits the nodes in
        **topological order**: a node comes after everything that uses it.
        """,
        r"""
        a가 h만큼 변하면 `a + a`의 두 피연산자가 모두 h만큼 변하고, 그 효과는 **더해집니다**. 그래디언트도 마찬가지입니다. 뒤로
        돌아가다 경로가 만나는 곳에서는 그래디언트를 더합니다. 그래서 ∂b = [[db]], ∂a = [[da]]입니다. $a \cdot a$도 두 피연산자가
        모두 a이므로 ∂a = a + a = [[dsq]]입니다.

        그래디언트가 다 모이기 전에 다음 노드로 넘기면 안 됩니다. b가 받는 대로 바로 넘긴다면 a가 받는 값은 [[da]]가 아니라
        [[hasty]]입니다. b의 첫 몫을 두 번 세기 때문입니다. 그래서 엔진은 **위상 정렬(topological order)** 순서로 노드를
        방문합니다. 어떤 노드를 쓰는 것들을 모두 방문한 뒤에 그 노드를 방문합니다.
        """,
        db=middle.grad.item(), da=start.grad.item(), dsq=square.grad.item(), hasty=hasty["a"],
    )  # fmt: skip
    return


@app.cell
def _(g_1, g_2, g_3, say):
    say(
        r"""
        ## What a cotangent is

        So far y was one number. Now let $\hat x$ = BN(x) for three samples. All derivatives together are a matrix, the
        **Jacobian** $J_{ij} = \partial \hat x_i / \partial x_j$. For a real layer it is far too large to write down. And
        it is not needed: the loss is one number. From the later layers arrives $g_i$, the gradient of the loss by each
        $\hat x_i$. Wanted is the gradient by each $x_j$, which is $\sum_i g_i J_{ij}$. The row $g$ is the **cotangent**, and
        $g^\top J$ the **vector-Jacobian product**. That product is all that a backward rule computes.

        [[g_1]]

        [[g_2]]

        [[g_3]]
        """,
        r"""
        ## 코탄젠트(cotangent)란

        지금까지 y는 수 하나였습니다. 이번에는 샘플 세 개에 대해 $\hat x$ = BN(x)라고 합시다. 미분을 모두 모으면 행렬, 곧
        **야코비 행렬(Jacobian)** $J_{ij} = \partial \hat x_i / \partial x_j$이 됩니다. 실제 레이어에서는 너무 커서 적을 수도 없습니다.
        하지만 손실은 수 하나라서 행렬 전체는 필요하지 않습니다. 뒤쪽 레이어에서 손실을 $\hat x_i$로 미분한 $g_i$가 들어오고, 구하려는 것은
        손실을 $x_j$로 미분한 $\sum_i g_i J_{ij}$입니다. 이 $g$를 **코탄젠트(cotangent)**라 하고, $g^\top J$를 **벡터-야코비
        곱(vector-Jacobian product)**이라 합니다. 역전파 규칙이 계산하는 것은 이 곱뿐입니다.

        [[g_1]]

        [[g_2]]

        [[g_3]]
        """,
        g_1=g_1, g_2=g_2, g_3=g_3,
    )  # fmt: skip
    return


@app.cell
def _(g_1, g_2, g_3, say):
    samples = np.array([1.0, 2.0, 6.0])

    def vjp(cotangent):
        t = Tensor(samples.reshape(3, 1), requires_grad=True)
        F.batch_norm(t, training=True).backward(np.reshape(cotangent, (3, 1)))
        return t.grad.numpy().ravel()

    jacobian = np.array([vjp(row) for row in np.eye(3)])
    g = np.array([g_1.value, g_2.value, g_3.value], float)
    mo.vstack([
        say(
            "With x = [[samples:.0f]] the Jacobian is, one backward pass for each row:",
            "x = [[samples:.0f]]일 때의 야코비 행렬입니다. 한 행을 구하는 데 역전파를 한 번 합니다.",
            samples=samples,
        ),
        table(
            {f"∂x̂{'₁₂₃'[i]}": row for i, row in enumerate(jacobian)} | {"gᵀ J": g @ jacobian, "backward(g)": vjp(g)},
            head=("", "x₁", "x₂", "x₃"),
        ),
        say(
            r"""
            The last two rows agree, and the engine never made the matrix. Set all g to 1, as `.sum().backward()` does: the
            gradient is 0, up to rounding ([[ones]]). The sum of $\hat x$ is 0 whatever x is, so its gradient has to be 0. To
            test a gradient of BatchNorm, use a random cotangent.
            """,
            r"""
            마지막 두 행이 같습니다. 엔진은 행렬을 만든 적이 없습니다. g를 모두 1로 해 보세요. `.sum().backward()`와 같은데,
            반올림 오차([[ones]])를 빼면 그래디언트가 0입니다. x가 무엇이든 $\hat x$의 합은 0이라 배울 것이 없기 때문입니다. 그러니
            배치 정규화의 그래디언트를 시험할 때는 코탄젠트를 무작위로 고르세요.
            """,
            ones=np.abs(vjp(np.ones(3))).max(),
        ),
    ])  # fmt: skip
    return


@app.cell
def _(b, say, w, x):
    point = parameter(x.value)
    out = F.tanh(point * w.value + b.value)
    first = grad(out, point, create_graph=True)
    second = grad(first, point)
    h = 1e-4
    slopes = [w.value * (1 - np.tanh(w.value * (x.value + d) + b.value) ** 2) for d in (-h, h)]
    say(
        r"""
        ## A gradient of a gradient

        The rules above are themselves plus, times and tanh. So the backward pass can be recorded as well:
        `grad(y, x, create_graph=True)` returns a tensor that has a graph of its own. For the neuron above, dy/dx = [[first]]
        and d²y/dx² = [[second]]. Two nearby slopes, subtracted and divided by their distance, give [[numeric]]. A second derivative says how fast the gradient changes, so how long a step along it can be. And a
        loss that contains a gradient, as a gradient penalty does, needs second derivatives to train.
        """,
        r"""
        ## 그래디언트의 그래디언트

        위의 규칙들도 덧셈, 곱셈, tanh입니다. 그러니 역전파 자체도 기록할 수 있습니다. `grad(y, x, create_graph=True)`가
        돌려주는 텐서에는 자신의 그래프가 있습니다. 위의 뉴런에서 dy/dx = [[first]], d²y/dx² = [[second]]입니다. 가까운 두 점의
        그래디언트를 빼서 거리로 나누면 [[numeric]]입니다. 2차 미분은 그래디언트가 얼마나 빨리 변하는지, 그래서 한 번에 얼마나 움직여도 되는지 알려
        줍니다. 또 그래디언트가 들어 있는 손실(gradient penalty)로 학습하려면 2차 미분이 필요합니다.
        """,
        first=first.item(), second=second.item(), numeric=(slopes[1] - slopes[0]) / (2 * h),
    )  # fmt: skip
    return


@app.cell
def _(say):
    say("## Exercises", "## 연습 문제")
    return


@app.cell
def _(one, say):
    neuron = [parameter(v) for v in (0.7, -1.2, 0.4)]
    F.tanh(neuron[0] * neuron[1] + neuron[2]).backward()
    say.exercise(
        "**1.** Compute `dw`, `dx` and `db` for y = tanh(w x + b), from the values `w`, `x`, `b`.",
        "**1.** 값 `w`, `x`, `b`가 주어졌을 때 y = tanh(w x + b)의 `dw`, `dx`, `db`를 구하세요.",
        one,
        "y = np.tanh(w * x + b)\nds = 1 - y * y\ndw, dx, db = ds * x, ds * w, ds",
        expects(**{f"d{name}": t.grad.item() for name, t in zip("wxb", neuron, strict=True)}),
        w=0.7, x=-1.2, b=0.4,
    )  # fmt: skip
    return


@app.cell
def _(say, two):
    u, v = (parameter(value) for value in (0.9, 1.7))
    (u * v * F.exp(u)).backward()
    say.exercise(
        "**2.** p = u v, q = exp u, y = p q. There are two paths from u to y. Compute `du` from `u` and `v`.",
        "**2.** p = u v, q = exp u, y = p q입니다. u에서 y로 가는 경로가 둘입니다. `u`와 `v`로 `du`를 구하세요.",
        two,
        "du = v * np.exp(u) + u * v * np.exp(u)",
        expects(du=u.grad.item()),
        u=0.9, v=1.7,
    )  # fmt: skip
    return


@app.cell
def _(say):
    say.next("lesson_2_normalise", "2. Normalise 1 … 20", "1부터 20까지 정규화하기")
    return


if __name__ == "__main__":
    app.run()
