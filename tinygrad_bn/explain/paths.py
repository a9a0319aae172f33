"""The ways by which a gradient arrives: one backward walk in which a gradient is a table {way: array}.

A gradient rule is linear in the gradient of its result, so each row of the table goes through it by itself. At a chosen
step a way gets one name longer; rows of equal ways are added. All rows of a tensor add up to its gradient.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any

from tinygrad_bn import autograd, backend
from tinygrad_bn.explain.steps import Pass, Step

LIMIT = 64  # ways; more cannot be read
Way = tuple[Step, ...]


def ways(p: Pass, x: Step, chosen: Collection[Step], add: Callable[[Any, Any], Any]) -> dict[Way, Any]:
    """The share of each way in the gradient of x in the pass `p`: arrays that sum to it.

    A way is told by those of the `chosen` steps that are on it, in the order from x to the result. Costs one backward
    pass between x and the result for each way, at most. Raises ValueError for more than 64 ways.
    """
    leads = {x}
    for step in reversed(p.nodes):  # in the order of the forward pass
        if any(o in leads for o in p.fed(step).values()):
            leads.add(step)
    tables: dict[Step, dict[Way, Any]] = defaultdict(dict)
    tables[p.y][()] = p.g
    for step, node in p.nodes.items():
        if step is x:
            break
        if step not in tables or step not in leads:
            continue
        needs = [i in (fed := p.fed(step)) and fed[i] in leads for i in range(len(step.operands))]
        for way, g in tables.pop(step).items():
            way = (step, *way) if step in chosen else way
            for i, gx in enumerate(autograd._pull(step.tensor, node, g, needs, False)):
                if gx is None:
                    continue
                table, share = tables[step.operands[i]], autograd._fit(gx, node.inputs[i], backend.forward)
                table[way] = add(table[way], share) if way in table else share
                if len(table) > LIMIT:
                    raise ValueError(
                        f"the gradient of {x.name} arrives by more than {LIMIT} ways; choose the steps that tell them "
                        "apart with via=, such as paths(via=['1.var', '1.mu'])"
                    )
    return tables[x]


def parting(p: Pass, x: Step) -> list[Step]:
    """The named steps that tell ways from x apart: those of the scopes in which they part first."""
    before, users = {x}, p.users(x)
    while len(users) == 1:
        before.add(users[0])
        users = p.users(users[0])
    if not users:
        return []
    scopes = {scope for user in users for scope in (user.scope, user.origin)}
    return [s for s in p.nodes if (s.scope in scopes or s.origin in scopes) and s.named and s not in before]
