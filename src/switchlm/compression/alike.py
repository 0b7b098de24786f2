"""Which experts are alike, and which hidden unit of one is which of another.

Shapes: E experts, D d_model, F d_ff.
"""

import torch
from torch import Tensor, nn

from switchlm.model.experts import FeedForwardExperts
from switchlm.model.switch import SwitchLayer


def cluster(layer: SwitchLayer, score_E: Tensor, number: int) -> list[list[int]]:
    """Return groups of experts, each led by its centre: one of the `number` that score highest.

    Two experts are alike as far as the router gives them the same tokens: by the cosine of their
    rows in its weight, the mean over all experts taken off.
    """
    row_ED = layer.router.weight.detach().float().cpu()
    row_ED = nn.functional.normalize(row_ED - row_ED.mean(0), dim=1)
    order = score_E.argsort(descending=True, stable=True).tolist()
    groups = [[centre] for centre in order[:number]]
    for other in order[number:]:
        closeness = row_ED[order[:number]] @ row_ED[other]
        groups[int(closeness.argmax())].append(other)
    return groups


def align(experts: FeedForwardExperts, centre: int, other: int) -> Tensor:
    """Return for each hidden unit of the centre the unit of the other that is most like it, [F].

    Each is taken once: of all pairs left, those that prefer each other are matched, again and
    again. The likeness of two units is the cosine of all their weights, in and out.
    """

    def units(expert: int) -> Tensor:
        weights = [experts.up[expert].t(), experts.down[expert]]
        if experts.gate is not None:
            weights.append(experts.gate[expert].t())
        joined_FW = torch.cat([weight.detach().float() for weight in weights], 1)
        return nn.functional.normalize(joined_FW, dim=1)

    likeness_FF = units(centre) @ units(other).t()
    order_F = torch.full((likeness_FF.shape[0],), -1)
    while (order_F < 0).any():
        best_F, chosen_F = likeness_FF.argmax(1), likeness_FF.argmax(0)
        unit_F = torch.arange(len(order_F))
        mutual_F = (chosen_F[best_F] == unit_F) & (order_F < 0)
        order_F[mutual_F] = best_F[mutual_F]
        likeness_FF[mutual_F] = -torch.inf
        likeness_FF[:, best_F[mutual_F]] = -torch.inf
    return order_F
