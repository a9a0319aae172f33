"""The sentences of `narrate`, in English and Korean. The numbers in braces are filled in by `narrate`."""

from __future__ import annotations

ENGLISH = {
    "title": "The backward pass of BatchNorm{of}, in channel {channel} of {channels}, over N = {n} values",
    "start": "The rest of the network gives ∂out = {dout}, one number for each value.",
    "bias": "out = gammax + bias. A sum passes its gradient on as it is: ∂gammax = ∂out. The bias was added to every "
    "value, so it collects all of them: ∂bias = Σ ∂out = {dbias}.",
    "weight": "gammax = weight · xhat, and weight = {weight}. A product passes on the gradient times the other factor: "
    "∂xhat = weight · ∂gammax = {dxhat}, and ∂weight = Σ ∂gammax · xhat = {dweight}.",
    "plain": "Without a weight and a bias, out is xhat: ∂xhat = ∂out = {dxhat}.",
    "xhat": "xhat = xmu · ivar is a product too. Here the first way leaves, straight to xmu: ∂xhat · ivar = {direct}.",
    "ivar": "The other factor, ivar = {ivar}, is one number for the whole channel, so it collects from every value: "
    "∂ivar = Σ ∂xhat · xmu = {divar}.",
    "sqrtvar": "ivar = 1 / sqrtvar, with sqrtvar = {sqrtvar}: ∂sqrtvar = −∂ivar / sqrtvar² = {dsqrtvar}.",
    "var": "sqrtvar = √(var + eps): ∂var = ∂sqrtvar / (2 sqrtvar) = {dvar}.",
    "sq": "var is the mean of sq, so each value has a share of 1/N: ∂sq = ∂var / N = {dsq}, the same for all.",
    "xmu": "sq = xmu². The second way, through the variance, arrives at xmu with ∂sq · 2 xmu = {variance}. Where ways "
    "meet, gradients add: ∂xmu = {dxmu}.",
    "mu": "xmu = x − mu. The mean was subtracted from every value, so it collects with a minus: ∂mu = −Σ ∂xmu = {dmu}. "
    "The variance has no part in this: Σ ∂sq · 2 xmu = {mean_of_variance}, because Σ xmu = 0.",
    "x": "x reaches xmu directly and through mu, and each value has a share of 1/N in mu. So the third way is "
    "∂mu / N = {mean}, and together ∂x = ∂xmu + ∂mu / N = {dx}.",
    "closed": "In one line: ∂x = ivar · (∂xhat − mean(∂xhat) − xhat · mean(∂xhat · xhat)) = {closed}. The largest "
    "difference from the steps is {difference}.",
    "sum": "Σ ∂x = {sum}: it vanishes, because a constant added to all x is taken off again with the mean, so the "
    "output does not change.",
    "scale": "Σ ∂x · xhat = {scale}: all x scaled by one factor give nearly the same output. Only eps, which is not "
    "scaled, keeps it from 0: it is ivar · Σ(∂xhat · xhat) · eps / (var + eps) = {exact}.",
    "given": "xhat = xmu · ivar. The mean and the variance are the running statistics, which do not depend on x. So "
    "there is one way only: ∂x = ∂xhat · ivar = {dx}, with ivar = {ivar}.",
    "given_sum": "Σ ∂x = {sum}: nothing makes it vanish. A constant added to all x moves the output here.",
    "other": "The backward pass, from {of} back",
    "step": "{name} = {call}: its gradient is {grad}. The rule: {formula}.",
}

KOREAN = {
    "title": "배치 정규화{of}의 역전파: 채널 {channels}개 중 {channel}번째 채널, 값 N = {n}개",
    "start": "뒤쪽 신경망에서 ∂out = {dout} 이 전해집니다. 값마다 하나씩입니다.",
    "bias": "out = gammax + bias 입니다. 덧셈은 그래디언트를 그대로 흘려보내므로 ∂gammax = ∂out 입니다. bias는 모든 "
    "값에 더해졌으므로 모두 모읍니다: ∂bias = Σ ∂out = {dbias}.",
    "weight": "gammax = weight · xhat 이고 weight = {weight} 입니다. 곱셈은 그래디언트에 상대 인수를 곱해 보냅니다: "
    "∂xhat = weight · ∂gammax = {dxhat}, ∂weight = Σ ∂gammax · xhat = {dweight}.",
    "plain": "weight와 bias가 없으면 out이 곧 xhat입니다: ∂xhat = ∂out = {dxhat}.",
    "xhat": "xhat = xmu · ivar 도 곱셈입니다. 여기서 첫 번째 경로가 xmu로 곧장 갈라져 나갑니다: "
    "∂xhat · ivar = {direct}.",
    "ivar": "다른 인수 ivar = {ivar} 는 채널 전체에 하나뿐인 수이므로 모든 값에서 그래디언트를 모읍니다: "
    "∂ivar = Σ ∂xhat · xmu = {divar}.",
    "sqrtvar": "ivar = 1 / sqrtvar 이고 sqrtvar = {sqrtvar} 입니다: ∂sqrtvar = −∂ivar / sqrtvar² = {dsqrtvar}.",
    "var": "sqrtvar = √(var + eps) 입니다: ∂var = ∂sqrtvar / (2 sqrtvar) = {dvar}.",
    "sq": "var는 sq의 평균이므로 각 값의 몫은 1/N입니다: ∂sq = ∂var / N = {dsq}. 모든 값에서 같습니다.",
    "xmu": "sq = xmu² 입니다. 분산을 지나는 두 번째 경로는 ∂sq · 2 xmu = {variance} 로 xmu에 도착합니다. 경로가 만나는 "
    "곳에서 그래디언트는 더해집니다: ∂xmu = {dxmu}.",
    "mu": "xmu = x − mu 입니다. 평균은 모든 값에서 빼 주었으므로 음의 부호로 모읍니다: ∂mu = −Σ ∂xmu = {dmu}. 분산을 "
    "지나는 경로는 여기에 보태는 것이 없습니다: Σ xmu = 0 이므로 Σ ∂sq · 2 xmu = {mean_of_variance} 입니다.",
    "x": "x는 xmu에 직접 닿고, mu를 거쳐서도 닿습니다. mu에서 각 값의 몫은 1/N이므로 세 번째 경로는 ∂mu / N = {mean} "
    "이고, 모두 더하면 ∂x = ∂xmu + ∂mu / N = {dx} 입니다.",
    "closed": "한 줄로 쓰면 ∂x = ivar · (∂xhat − mean(∂xhat) − xhat · mean(∂xhat · xhat)) = {closed} 입니다. 한 단계씩 "
    "구한 값과의 가장 큰 차이는 {difference} 입니다.",
    "sum": "Σ ∂x = {sum} 로 0입니다(반올림 오차 안에서). 모든 x에 같은 상수를 더해도 평균을 빼면서 사라지므로 출력이 "
    "변하지 않기 때문입니다.",
    "scale": "Σ ∂x · xhat = {scale} 입니다. 모든 x에 같은 수를 곱해도 출력은 거의 그대로입니다. 함께 커지지 않는 eps "
    "때문에 꼭 0은 아니며, 그 값은 ivar · Σ(∂xhat · xhat) · eps / (var + eps) = {exact} 입니다.",
    "given": "xhat = xmu · ivar 입니다. 평균과 분산은 이동 통계량(running statistics)이라 x에 따라 변하지 않습니다. "
    "그래서 경로는 하나뿐입니다: ivar = {ivar} 이고 ∂x = ∂xhat · ivar = {dx}.",
    "given_sum": "Σ ∂x = {sum} 로, 0이 될 까닭이 없습니다. 여기서는 모든 x에 상수를 더하면 출력도 움직입니다.",
    "other": "{of}에서 거꾸로 가는 역전파",
    "step": "{name} = {call}: 그래디언트는 {grad} 입니다. 규칙: {formula}.",
}

WORDS = {"en": ENGLISH, "ko": KOREAN}
