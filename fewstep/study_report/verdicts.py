"""The paper's six takeaways (arXiv 2606.03746) as contrasts, and the rule that judges them.

The rule. A takeaway is a list of claims that must all hold. A claim is one contrast, or several of
which one suffices. With m contrasts in a takeaway each has a 1 - 0.05/m interval (Bonferroni), so
that all of them hold their true values together in 95% of studies. A claim is

- reproduced if a contrast's whole interval lies above `above` (0, or -MARGIN for "does no harm"),
- not reproduced if all of them lie wholly below `below` (MARGIN: the other side of 0, or so little
  above it that nobody would see it),
- undecided otherwise, with the number of seeds or prompts that would settle it.

Where the paper speaks of the best of several runs the claim asks each of them in turn, at its share
of the error, and none is picked by its own score: picking first would find a winner among equals.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple

from fewstep.evals.findings import TASK_TITLES, category_title
from fewstep.evals.stats import TIE, Interval
from fewstep.study_report.curves import stability
from fewstep.study_report.intervals import Estimate, seed_interval
from fewstep.study_report.read import Study

MARGIN = TIE
"""Points on the 1-5 scale that count as no difference, as in the win counts of a run's report."""

ERROR = 0.05
Word = Literal["reproduced", "not reproduced", "undecided"]
ORDER: tuple[Word, ...] = ("not reproduced", "undecided", "reproduced")
"""A takeaway takes the first of these that one of its claims has."""


@dataclass(frozen=True)
class Contrast:
    """A number that a takeaway hangs on."""

    words: str
    paper: str
    """The same in the paper's own tables, Gemini / GPT."""
    estimate: Estimate | None
    lacks: str = ""
    """Why there is no estimate."""
    above: float = 0.0
    below: float = MARGIN
    two_sided: bool = False
    """Either sign is the paper's side."""

    @property
    def verdict(self) -> Word:
        if self.estimate is None:
            return "undecided"
        _, low, high = self.estimate.interval
        if low is None or high is None:
            return "undecided"
        if low > self.above or (self.two_sided and high < -self.above):
            return "reproduced"
        if high < self.below and (low > -self.below or not self.two_sided):
            return "not reproduced"
        return "undecided"

    @property
    def needs(self) -> str:
        """What would settle it if the estimate is true; nothing where it is settled."""
        if self.verdict != "undecided":
            return ""
        if self.estimate is None:
            return self.lacks
        value, low, _ = self.estimate.interval
        if low is None:
            return "at least two training seeds a variant (and two prompts a category)"
        if self.two_sided:
            value = abs(value)
        over, under = value - self.above, self.below - value
        return self.estimate.needed(max(over, under))


@dataclass(frozen=True)
class Claim:
    words: str
    contrasts: tuple[Contrast, ...]
    """One of them suffices."""

    @property
    def verdict(self) -> Word:
        found: list[Word] = [contrast.verdict for contrast in self.contrasts]
        if "reproduced" in found:
            return "reproduced"
        return "undecided" if "undecided" in found or not found else "not reproduced"


@dataclass(frozen=True)
class Takeaway:
    number: int
    statement: str
    rule: str
    """The contrast in one line."""
    claims: tuple[Claim, ...]
    lacks: str = ""
    """Why the study says nothing about it."""

    @property
    def verdict(self) -> Word:
        if self.lacks or not self.claims:
            return "undecided"
        found = {claim.verdict for claim in self.claims}
        return next(word for word in ORDER if word in found)

    @property
    def contrasts(self) -> list[Contrast]:
        return [contrast for claim in self.claims for contrast in claim.contrasts]


class _Asked(NamedTuple):
    """A contrast before its level is known."""

    words: str
    paper: str
    weights: dict[str, float]
    """By role, or `@base` for the base teacher at its full evaluations."""
    task: str = "t2i"
    category: str | None = None
    above: float = 0.0
    below: float = MARGIN
    two_sided: bool = False
    fall: bool = False
    """Of falls from the best probe to the last one instead of final scores."""


def judge(study: Study) -> list[Takeaway]:
    """The takeaways that study.yaml names; without any, all six if its variants play roles of the
    paper, and none if they do not."""
    wanted = study.takeaways or (tuple(TAKEAWAYS) if study.roles else ())
    return [TAKEAWAYS[number](study) for number in wanted if number in TAKEAWAYS]


def choosing_data(study: Study) -> Takeaway:
    """any |e_i - e_j| > 0 on T2I, and (e4 - e5) > -margin on text-centric (e5 adds that data)."""
    runs = [role for role in ("e1", "e2", "e3", "e4", "e5") if study.variant(role)]
    pairs = [
        _Asked(f"{a} − {b}, T2I", _paper(a, b), {a: 1, b: -1}, two_sided=True)
        for a, b in combinations(runs, 2)
    ]
    adding = _Asked(
        "e4 − e5, text-centric: data added for this very target",
        "+0.99 / +1.08",
        {"e4": 1, "e5": -1},
        category="text",
        above=-MARGIN,
        below=-MARGIN,
    )
    return _takeaway(
        study,
        1,
        "Choosing data matters; adding data that covers the target can be useless or harmful.",
        choosing_data,
        [("some two compositions differ", pairs), ("added data does not help", [adding])],
        needs=("e4", "e5"),
    )


def coherent_category(study: Study) -> Takeaway:
    """(e2 - e1 on landscape) > -margin, and max(e1, e2) - e4 > 0 on T2I, asked of both at once."""
    transfer = _Asked(
        "e2 (portraits) − e1 (landscapes), landscape",
        "+0.03 / +0.05",
        {"e2": 1, "e1": -1},
        category="landscape",
        above=-MARGIN,
        below=-MARGIN,
    )
    merging = [
        _Asked(f"{one} − e4, T2I", _paper(one, "e4"), {one: 1, "e4": -1}) for one in ("e1", "e2")
    ]
    return _takeaway(
        study,
        2,
        "One coherent category can transfer beyond its domain; merging two good ones can be worse "
        "than the best one.",
        coherent_category,
        [("a category transfers", [transfer]), ("merging costs", merging)],
        needs=("e1", "e2", "e4"),
    )


def specialised_alone(study: Study) -> Takeaway:
    """fall(specialised_only) - fall(stepwise) > 0, T2I or editing; fall: best probe - last one."""
    falls = [
        _Asked(
            f"fall of specialised_only − fall of stepwise, {TASK_TITLES[task].lower()} probes",
            "figure 3: early gain, then structural misalignment",
            {"specialised_only": 1, "stepwise": -1},
            task=task,
            fall=True,
        )
        for task in TASK_TITLES
        if _probed(study, "specialised_only", task) and _probed(study, "stepwise", task)
    ]
    return _takeaway(
        study,
        3,
        "A specialised teacher as the only guide destabilises training.",
        specialised_alone,
        [("it falls further from its peak than step-wise guidance", falls)],
        needs=("specialised_only", "stepwise"),
        unprobed="no cell logged probe/score in the finished runs of both strategies",
    )


def stepwise_guidance(study: Study) -> Takeaway:
    """stepwise - base_only > 0, stepwise - specialised_only > 0 on T2I, and fall(stepwise) is not
    more than fall(base_only) + margin."""
    above = [
        _Asked(f"stepwise − {other}, T2I", "not in a table", {"stepwise": 1, other: -1})
        for other in ("base_only", "specialised_only")
    ]
    stable = [
        _Asked(
            "fall of base_only − fall of stepwise, text-to-image probes",
            "not given",
            {"base_only": 1, "stepwise": -1},
            above=-MARGIN,
            below=-MARGIN,
            fall=True,
        )
    ]
    return _takeaway(
        study,
        4,
        "Step-wise multi-teacher guidance keeps training stable and ends above either teacher "
        "alone.",
        stepwise_guidance,
        [
            ("above the base teacher alone", above[:1]),
            ("above the specialised teacher alone", above[1:]),
            ("as stable as the base teacher alone", stable),
        ],
        needs=("stepwise", "base_only", "specialised_only"),
    )


def editing_share(study: Study) -> Takeaway:
    """zero_shot - r9to1, r5to5 - r9to1, r5to5 - r7to3 and r5to5 - zero_shot > 0 on editing."""
    pairs = [
        ("too little editing data hurts editing", "zero_shot", "r9to1", "+0.19 / −0.03"),
        ("balanced above 9:1", "r5to5", "r9to1", "+0.39 / +0.10"),
        ("balanced above 7:3", "r5to5", "r7to3", "+0.10 / +0.05"),
        ("balanced above none", "r5to5", "zero_shot", "+0.20 / +0.13"),
    ]
    claims = [
        (words, [_Asked(f"{a} − {b}, editing", paper, {a: 1, b: -1}, task="edit")])
        for words, a, b, paper in pairs
    ]
    return _takeaway(
        study,
        5,
        "Too little editing data hurts editing; the balanced mixture is best.",
        editing_share,
        claims,
        needs=("zero_shot", "r9to1", "r7to3", "r5to5"),
    )


def editing_helps_t2i(study: Study) -> Takeaway:
    """mean(r9to1, r7to3, r5to5) - zero_shot > 0 on T2I."""
    mixtures = ("r9to1", "r7to3", "r5to5")
    weights = dict.fromkeys(mixtures, 1 / 3) | {"zero_shot": -1.0}
    asked = _Asked("mean of r9to1, r7to3, r5to5 − zero_shot, T2I", "+0.06 / +0.03", weights)
    return _takeaway(
        study,
        6,
        "Editing supervision also improves text-to-image.",
        editing_helps_t2i,
        [("mixtures above T2I only", [asked])],
        needs=("zero_shot", *mixtures),
    )


TAKEAWAYS: dict[int, Callable[[Study], Takeaway]] = {
    1: choosing_data,
    2: coherent_category,
    3: specialised_alone,
    4: stepwise_guidance,
    5: editing_share,
    6: editing_helps_t2i,
}

PAPER_T2I = {
    "e1": (3.30, 4.13),
    "e2": (3.42, 4.15),
    "e3": (2.63, 3.29),
    "e4": (3.40, 4.06),
    "e5": (3.02, 3.62),
}
"""Table 1, average: Gemini, GPT."""


def _paper(a: str, b: str) -> str:
    gaps = [x - y for x, y in zip(PAPER_T2I[a], PAPER_T2I[b], strict=True)]
    return " / ".join(f"{gap:+.2f}".replace("-", "−") for gap in gaps)


def _takeaway(
    study: Study,
    number: int,
    statement: str,
    rule: Callable[[Study], Takeaway],
    claims: Sequence[tuple[str, Sequence[_Asked]]],
    *,
    needs: Sequence[str],
    unprobed: str = "",
) -> Takeaway:
    total = sum(len(asked) for _, asked in claims)
    level = 1 - ERROR / max(1, total)
    lacking = [role for role in needs if not study.variant(role)]
    lacks = f"no finished cell plays {', '.join(lacking)}" if lacking else ""
    if not lacks and not total:
        lacks = unprobed
    return Takeaway(
        number,
        statement,
        " ".join((rule.__doc__ or "").split()).rstrip("."),
        tuple(
            Claim(words, tuple(_answer(study, one, level=level) for one in asked))
            for words, asked in claims
        ),
        lacks,
    )


def _answer(study: Study, asked: _Asked, *, level: float) -> Contrast:
    weights: dict[str, float] = {}
    lacks = ""
    for role, weight in asked.weights.items():
        name = study.variant(role)
        if name is None:
            lacks = f"no finished cell plays {role}"
        else:
            weights[name] = weight
    estimate = None
    if not lacks:
        if asked.fall:
            estimate = fall_estimate(study, weights, asked.task, level=level)
            lacks = "no probes of the same seeds to compare"
        else:
            estimate = study.estimate(weights, asked.task, asked.category, level=level)
            where = asked.category and category_title(asked.category).lower()
            lacks = f"no case of {where or TASK_TITLES[asked.task].lower()} is scored for all"
    return Contrast(
        words=asked.words,
        paper=asked.paper,
        estimate=estimate,
        lacks="" if estimate else lacks,
        above=asked.above,
        below=asked.below,
        two_sided=asked.two_sided,
    )


def fall_estimate(
    study: Study, weights: Mapping[str, float], task: str, *, level: float = 0.95
) -> Estimate | None:
    """A contrast of falls, paired by training seed: the t interval over seeds alone.

    The probes' prompts are a small fixed set, so it speaks of these prompts.
    """
    falls: dict[str, dict[int, float]] = {}
    for variant in weights:
        found = [stability(cell, task) for cell in study.finished(variant)]
        falls[variant] = {entry.seed: entry.fall for entry in found if entry is not None}
    seeds = sorted(set.intersection(*(set(own) for own in falls.values())))
    if not seeds:
        return None
    values = [sum(w * falls[name][seed] for name, w in weights.items()) for seed in seeds]
    interval = seed_interval(values, level=level)
    mean = interval.value
    spread = sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1) / len(values)
    return Estimate(
        interval=Interval(*interval),
        level=level,
        cases=0,
        dropped=0,
        seeds=len(seeds),
        prompt_variance=0.0,
        seed_variance=spread,
    )


def _probed(study: Study, role: str, task: str) -> bool:
    name = study.variant(role)
    return name is not None and any(stability(cell, task) for cell in study.finished(name))
