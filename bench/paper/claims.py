"""The paper's claims, each with what the CSV of an experiment says of it, and a verdict.

The verdicts are computed, by the rules here and in ``verdicts``, so that another run gives its own.
"""

from __future__ import annotations

import csv
from math import inf, isnan
from typing import TYPE_CHECKING, NamedTuple

from .verdicts import (
    CONTRARY,
    NOT_TESTED,
    PAR,
    POINTS,
    SHOWN,
    UNDECIDED,
    Row,
    above_zero,
    all_or_part,
    between,
    by,
    interval,
    on_a_par,
    together,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Rows = list[Row]


class Claim(NamedTuple):
    """What the paper says, where, and the table that speaks of it.

    Attributes:
        judge: of the table's rows, what was measured and the verdict.
    """

    text: str
    where: str
    table: str
    judge: Callable[[Rows], tuple[str, str]]


def corollary_1(rows: Rows) -> tuple[str, str]:
    """Powers of two keep all bits, other condition numbers stay within rounding."""
    exact = [r["same_bits"] == "True" for r in rows if float(r["condition_number"]) == 2**17]
    other = max(float(r["largest_difference"]) for r in rows if r["dtype"] == "float32")
    told = f"the same bits in {sum(exact)} of {len(exact)} runs at 2^17; "
    told += f"within {other:.1e} at 1e5 in float32"
    return told, all_or_part([*exact, other < 1e-6])


def par_with_bn(rows: Rows) -> tuple[str, str]:
    """Differences of test errors with BN."""
    told = f"Adam-l2's error minus AdamW's, points: {by('network', rows)}"
    return told, together(map(on_a_par, rows))


def no_decay_with_bn(rows: Rows) -> tuple[str, str]:
    """What the best decay gains over none: less than a point, and not clearly more than 0."""
    told = [f"{r['network']} {r['optimizer']}, lambda {r['lambda']}: {interval(r)}" for r in rows]
    verdicts = [
        SHOWN
        if float(r["lambda"]) == 0
        else CONTRARY
        if float(r["low"]) > 0
        else between(r, -inf, PAR)
        for r in rows
    ]
    return "points that the best lambda gains over 0: " + "; ".join(told), together(verdicts)


def decoupled(rows: Rows) -> tuple[str, str]:
    """What is lost by a lambda that was chosen at another alpha, in one seed."""
    lost = {(r["network"], r["optimizer"]): float(r["lost_mean"]) for r in rows}
    networks = list(dict.fromkeys(r["network"] for r in rows))
    told = "; ".join(
        f"{n} {POINTS * lost[n, 'AdamW']:.1f} and {POINTS * lost[n, 'Adam-l2']:.1f}"
        for n in networks
    )
    more = [lost[n, "Adam-l2"] - lost[n, "AdamW"] for n in networks]
    clear = 3 * PAR  # what should agree differs by nearly two points in one seed
    verdicts = [SHOWN if m > clear else CONTRARY if m < -clear else UNDECIDED for m in more]
    told = f"points that AdamW and Adam-l2 lose by another alpha's lambda: {told}"
    return told, together(verdicts)


def smaller_error(rows: Rows) -> tuple[str, str]:
    """Differences of test errors without BN."""
    told = f"Adam-l2's error minus AdamW's, points: {by('network', rows)}"
    return told, together(map(above_zero, rows))


def more_so_deeper(rows: Rows) -> tuple[str, str]:
    """How the gains grow with the logarithm of the depth, also without some of the networks."""
    told = "; ".join(f"{row['networks']} {interval(row)}" for row in rows)
    return f"points for each doubling of the layers: {told}", together(map(above_zero, rows))


def where_concentrated(rows: Rows) -> tuple[str, str]:
    """Whether AdamW's updates are the concentrated ones in each network in which it gains."""
    gaining = [r for r in rows if float(r["gain_low"]) > 0]
    if not gaining:
        return "it gains in none", UNDECIDED
    told, verdict = concentrated(gaining)
    return f"where it gains, {told}", verdict


def trains_faster(rows: Rows) -> tuple[str, str]:
    """Training losses over the whole training."""
    told = "; ".join(
        "{} {:.2f} ({:.2f} .. {:.2f})".format(
            r["network"], *(float(r[f"loss_ratio{end}"]) for end in ("", "_low", "_high"))
        )
        for r in rows
    )
    verdicts = [between(r, 0.0, 1.0, "loss_ratio_") for r in rows]
    return f"AdamW's training loss over Adam-l2's: {told}", together(verdicts)


def concentrated(rows: Rows) -> tuple[str, str]:
    """Spreads of log2 magnitudes, with and without the outer bins."""
    told = f"Adam-l2's spread minus AdamW's, octaves: {by('network', rows, unit=1)}"
    verdicts = []
    for r in rows:
        inner = {key: r[f"{key}_inner"] for key in ("low", "high")}
        both = {above_zero(r), above_zero(inner)}
        verdicts.append(both.pop() if len(both) == 1 else UNDECIDED)
    return told, together(verdicts)


def dispersed_with_depth(rows: Rows) -> tuple[str, str]:
    """Whether Adam-l2's spread grows with the depth, and AdamW's less than half as much."""
    names = ("Adam-l2", "AdamW", "no_decay")
    spreads = {name: [float(r[name]) for r in rows] for name in names}
    told = "; ".join(
        f"{name.replace('_', ' ')} {', '.join(f'{value:.1f}' for value in values)}"
        for name, values in spreads.items()
    )
    growth = {name: values[-1] - values[0] for name, values in spreads.items()}
    flags = [growth["Adam-l2"] > 0, growth["AdamW"] < growth["Adam-l2"] / 2]
    networks = f"{rows[0]['network']} to {rows[-1]['network']}"
    return f"spreads in octaves, {networks}: {told}", all_or_part(flags)


def scale_freeness_carries_it(rows: Rows) -> tuple[str, str]:
    """Where AdamW gains: whether half of it or more is left if Adam-l2's weights shrink as much.

    A control that is worse than Adam-l2 itself tells nothing, and one without a lambda is AdamW.
    """
    told, verdicts = [], []
    of = {(r["network"], r["control"]): r for r in rows}
    for network in dict.fromkeys(r["network"] for r in rows):
        adam, shrunk = of[network, "Adam-l2"], of[network, "Adam-l2, shrunk as AdamW"]
        none, scaled = of[network, "neither"], of[network, "Adam-l2, scaled start"]
        told.append(
            f"{network} {_gain(adam)}, over a shrunk one {_gain(shrunk)}, over none {_gain(none)}, "
            f"from a scaled start {_gain(scaled)}"
        )
        if above_zero(adam) == SHOWN:
            tells = float(shrunk["gain"]) <= float(adam["gain"]) and float(adam["lambda"]) > 0
            half = float(adam["gain"]) / 2
            verdicts.append(between(shrunk, half, inf) if tells else UNDECIDED)
    verdict = together(verdicts) if verdicts else UNDECIDED
    return f"points that AdamW gains: {'; '.join(told)}", verdict


def _gain(row: Row) -> str:
    return interval({**row, "mean": row["gain"]})


def factor_of_the_loss(rows: Rows) -> tuple[str, str]:
    """Whether Adam-l2's move farther over lambda than over lambda / c, and than AdamW's."""
    told = ", ".join(f"than {row['than']} {interval(row)}" for row in rows)
    verdict = together(above_zero(row) for row in rows)
    return f"points that Adam-l2's errors over lambda move farther: {told}", verdict


def eps_0(rows: Rows) -> tuple[str, str]:
    """Step for step without eps."""
    exact = [
        float(r["largest_relative_difference"]) == 0
        for r in rows
        if r["optimizer"] != "Adam-l2" and float(r["factor"]) == 128
    ]
    moved = max(
        float(r["largest_relative_difference"]) for r in rows if r["optimizer"] == "Adam-l2"
    )
    told = f"all bits are kept in {sum(exact)} of {len(exact)} runs at a factor of 128; "
    told += f"Adam-l2's loss moves by {100 * moved:.0f} %"
    return told, all_or_part([*exact, moved > 0.01])


def adamprox_like_adamw(rows: Rows) -> tuple[str, str]:
    """AdamW's best setting in both."""
    told = f"AdamW's error minus AdamProx's, points: {by('network', rows)}"
    return told, together(map(on_a_par, rows))


def remainder(rows: Rows) -> tuple[str, str]:
    """The slopes in a plot of logarithms."""
    slopes = {r["over"]: float(r["slope_of_all"]) for r in rows}
    told = f"eta^{slopes['eta']:.2f}, lambda^{slopes['lambda']:.2f}"
    near = [abs(slopes["eta"] - 2) < 0.1, abs(slopes["lambda"] - 1) < 0.1]
    return told, all_or_part(near)


def l2_on_a_par(rows: Rows) -> tuple[str, str]:
    """AdamProxL2's error minus AdamW's; a smaller one is good, too. One way that can is enough."""
    of_l2 = [r for r in rows if r["optimizer"].startswith("AdamProxL2")]
    named = [{**r, "rule": f"{r['optimizer']}, lambda {float(r['lambda']):g}"} for r in of_l2]
    told = f"error minus AdamW's, points: {by('rule', named)}"
    # Without decay it would be AdamW without decay.
    verdicts = [between(r, -inf, PAR) for r in of_l2 if float(r["lambda"]) > 0]
    return told, SHOWN if SHOWN in verdicts else together(verdicts or [UNDECIDED])


def l1_makes_zeros(rows: Rows) -> tuple[str, str]:
    """Whether half of the weights or more may be zero at the cost of at most a point."""
    of_l1 = [r for r in rows if r["training"] == "AdamProxL1"]
    told = "; ".join(f"{100 * float(r['zeros']):.0f} % zeros {_gain(r)}" for r in of_l1)
    sparse = [between(r, -PAR, inf) for r in of_l1 if float(r["zeros"]) >= 0.5]
    verdict = SHOWN if SHOWN in sparse else together(sparse or [CONTRARY])
    return f"accuracy minus dense, points: {told}", verdict


def scale_free(rows: Rows) -> tuple[str, str]:
    """Which of the directions and decays keep every bit; M_t of AdaGrad is no part of the claim."""
    of = [(r["direction"], r["decay"], r["scale_free"] == "True") for r in rows]
    told = "; ".join(f"{direction}, {decay}" for direction, decay, free in of if free)
    as_claimed = [
        free == (direction != "SGD" and not decay.startswith("coupled"))
        for direction, decay, free in of
        if "M_t" not in decay
    ]
    return f"all bits are kept by {told or 'none'}", all_or_part(as_claimed)


def descent_depends(rows: Rows) -> tuple[str, str]:
    """Gradient descent's last distance, tuned for each condition number."""
    distances = {
        float(r["condition_number"]): float(r["last_distance"])
        for r in rows
        if r["algorithm"] != "AdamW"
    }
    well, ill = distances[min(distances)], distances[max(distances)]
    told = f"it ends {well:.2g} away at {min(distances):g}, {ill:.2g} at {max(distances):g}"
    return told, SHOWN if ill > 100 * max(well, 1e-6) else CONTRARY


def step_sizes(rows: Rows) -> tuple[str, str]:
    """The largest step size that converges, over the weight decay."""
    largest: dict[str, list[float]] = {"coupled": [], "proximal": []}
    for r in sorted(rows, key=lambda row: float(row["weight_decay"])):
        largest[r["decay"].partition(",")[0]].append(float(r["largest_eta"]))
    told = "; ".join(f"{k} {', '.join(f'{x:.2g}' for x in v)}" for k, v in largest.items())
    coupled, proximal = largest["coupled"], largest["proximal"]
    flags = [min(proximal) >= proximal[0], coupled[-1] < coupled[0]]
    return f"largest eta with more and more decay: {told}", all_or_part(flags)


def theorem_1(rows: Rows) -> tuple[str, str]:
    """The distance to the minimizer over the condition number."""
    most = {
        name: max(float(r["distance"]) for r in rows if r["algorithm"] == name)
        for name in ("AdaGrad", "SGD")
    }
    told = f"AdaGrad ends {most['AdaGrad']:.2g} away at most, gradient descent {most['SGD']:.2g}"
    return told, SHOWN if most["AdaGrad"] < 0.01 < most["SGD"] else CONTRARY


def theorem_2(rows: Rows) -> tuple[str, str]:
    """The regret of each round over its bound."""
    most = max(float(r["regret_share"]) for r in rows)
    told = f"at most {100 * most:.0f} % of the bound in {len(rows)} rounds of Algorithm 3"
    return told, SHOWN if most <= 1 else CONTRARY


def theorem_3(rows: Rows) -> tuple[str, str]:
    """The bound in every round."""
    flags = [r["holds"] == "True" for r in rows]
    return f"the bound holds in {sum(flags)} of {len(flags)} rounds", all_or_part(flags)


def sgd_diverges(rows: Rows) -> tuple[str, str]:
    """Of SGD without BN: the loss at the smallest learning rate, beside the start's."""
    losses = {float(r["lr"]): float(r["loss"]) for r in rows if r["batch_norm"] == "False"}
    start = losses.pop(0.0)
    smallest = min(losses)
    diverged = [lr for lr, loss in losses.items() if isnan(loss)]
    told = f"the loss at {smallest:g} is {losses[smallest]:g}, at the start {start:g}; "
    told += f"NaN from {min(diverged):g} on" if diverged else "NaN at no learning rate"
    return told, CONTRARY if losses[smallest] < 2 * start else SHOWN


def without_bn_on_ranks(rows: Rows) -> tuple[str, str]:
    """What several ranks cost AdamW with BN, and what it gains over Adam-l2 without.

    Without BN they cost nothing but other roundings.
    """
    of = {(r["batch_norm"], r["optimizer"], int(r["ranks"])): r for r in rows}
    most = max(ranks for _, _, ranks in of)
    without, with_bn = of["False", "AdamW", most], of["True", "AdamW", most]
    told = f"points that {most} ranks cost AdamW: without BN {interval(without, prefix='cost_')}"
    told += f", with BN {interval(with_bn, prefix='cost_')}; without BN AdamW gains "
    told += f"{interval(without, prefix='gain_')} over Adam-l2"
    return told, together([above_zero(with_bn, "cost_"), above_zero(without, "gain_")])


CLAIMS = (
    Claim("AdamW's iterates do not depend on the condition number of a diagonal Hessian",
          "Corollary 1, figure 1", "corollary-1", corollary_1),
    Claim("Those of gradient descent do, although it is tuned",
          "3, figure 1", "figure-1", descent_depends),
    Claim("With BN, Adam-l2 is on a par with AdamW", "4.1, figure 2", "advantage-bn", par_with_bn),
    Claim("With BN, the best lambda is 0", "4.1, figure 2", "without-decay", no_decay_with_bn),
    Claim("AdamW decouples lambda from alpha better", "4.1, figure 2", "decoupling", decoupled),
    Claim("Without BN, AdamW has a smaller test error",
          "4.1, figure 3", "advantage", smaller_error),
    Claim("The more so, the deeper", "4.1, figure 3", "advantage-by-depth", more_so_deeper),
    Claim("Without BN, AdamW trains faster", "4.1, figure 3", "advantage", trains_faster),
    Claim("AdamW's update magnitudes are more concentrated",
          "4.1, figures 3, 7 to 12", "concentration", concentrated),
    Claim("AdamW gains where its updates are the more concentrated ones",
          "4.1", "concentration", where_concentrated),
    Claim("Adam-l2's disperse with the depth, AdamW's stay",
          "4.1, figures 7 to 12", "concentration", dispersed_with_depth),
    Claim("Scale-freeness is what AdamW gains by (a hypothesis)",
          "abstract, 4.1", "mechanism", scale_freeness_carries_it),
    Claim("A factor of the loss moves Adam-l2's errors, not AdamW's",
          "4.2, figure 4", "figure-4-moved", factor_of_the_loss),
    Claim("With eps = 0 it moves no loss of AdamW and AdamProx", "4.2", "loss-factor", eps_0),
    Claim("AdamProx behaves like AdamW", "4.3, figure 5", "figure-5-seeds", adamprox_like_adamw),
    Claim("The remainder is O(lambda * eta^2)", "3", "taylor", remainder),
    Claim("AdamProxL2 can be on a par with AdamW", "5, figure 6", "section-5", l2_on_a_par),
    Claim("AdamProxL1 makes networks sparse (an open question)",
          "5", "sparsity", l1_makes_zeros),
    Claim("AdaGrad's and Adam's directions are scale-free. l2 in the gradient ends that, "
          "a proximal decay does not", "3", "scale-freeness", scale_free),
    Claim("A proximal decay does not limit the step size, one in the gradient does",
          "3", "stability", step_sizes),
    Claim("Scale-free algorithms do as well as with the best scaling",
          "Theorem 1", "theorem-1", theorem_1),
    Claim("AdaGrad's regret has a bound", "Theorem 2", "theorem-3", theorem_2),
    Claim("AdaGrad with restarts ends within D / 2^i after i rounds of 32 d kappa steps",
          "Theorem 3", "theorem-3", theorem_3),
    Claim("SGD without BN diverges even at 1e-10", "4.1", "sgd", sgd_diverges),
    Claim("Without BN, AdamW suits distributed training (an open question)",
          "5", "distributed", without_bn_on_ranks),
)  # fmt: skip


def judged(folder: Path) -> list[dict[str, str]]:
    """Of each claim, what was measured and the verdict, from the CSV in a folder."""
    result = []
    for claim in CLAIMS:
        file = folder / f"{claim.table}.csv"
        measured, verdict = "", NOT_TESTED
        if file.exists():
            with file.open(newline="") as opened:
                measured, verdict = claim.judge(list(csv.DictReader(opened)))
        row = {"claim": claim.text, "of": claim.where, "measured": measured, "verdict": verdict}
        result.append(row)
    return result
