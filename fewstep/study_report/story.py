"""What a study says, in the order of its report: answers, tables, and what it cannot say."""

from dataclasses import dataclass

from fewstep.evals.findings import TASK_TITLES
from fewstep.study_report.read import DONE, Study
from fewstep.study_report.tables import (
    Table,
    against_base,
    contrast_table,
    cost_table,
    score_tables,
    stability_table,
    verdict_table,
)
from fewstep.study_report.verdicts import TAKEAWAYS, Takeaway, judge


@dataclass(frozen=True)
class Story:
    lede: tuple[str, ...]
    takeaways: tuple[Takeaway, ...]
    verdicts: Table
    contrasts: tuple[Table, ...]
    scores: tuple[Table, ...]
    against_base: tuple[tuple[Table, str], ...]
    """By task, whether a student beats the base teacher at full evaluations, or why none does."""
    stability: Table | None
    cost: Table
    limits: tuple[str, ...]
    """What the study does not show."""

    @property
    def tables(self) -> tuple[Table, ...]:
        base = [table for table, _ in self.against_base]
        rest = [part for part in (self.stability, self.cost) if part is not None]
        asked = (self.verdicts, *self.contrasts) if self.takeaways else ()
        return (*asked, *self.scores, *base, *rest)


def tell(study: Study) -> Story:
    takeaways = tuple(judge(study))
    base = [found for task in study.tasks if (found := against_base(study, task)) is not None]
    return Story(
        lede=_lede(study, takeaways),
        takeaways=takeaways,
        verdicts=verdict_table(takeaways),
        contrasts=tuple(contrast_table(takeaway) for takeaway in takeaways if takeaway.claims),
        scores=tuple(score_tables(study)),
        against_base=tuple((table, " ".join(said)) for table, said in base),
        stability=stability_table(study),
        cost=cost_table(study),
        limits=tuple(_limits(study, takeaways)),
    )


def _lede(study: Study, takeaways: tuple[Takeaway, ...]) -> tuple[str, ...]:
    said = []
    for word in ("reproduced", "not reproduced", "undecided"):
        numbers = [str(t.number) for t in takeaways if t.verdict == word]
        if numbers:
            said.append(f"Takeaway{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}: {word}.")
    done = sum(cell.status == DONE for cell in study.cells)
    if done < len(study.cells):
        said.append(f"Only {done} of {len(study.cells)} cells are finished.")
    return tuple(said)


def _limits(study: Study, takeaways: tuple[Takeaway, ...]) -> list[str]:
    seeds = {len(study.finished(name)) for name in study.titles if study.finished(name)}
    limits = [
        "It is about one teacher, one student size and one budget; the paper's own models, prompts "
        "and judges were not used, so its numbers stand beside ours for their order only.",
    ]
    if study.judge:
        limits.append(
            f"Scores are those of {study.judge} alone. What it cannot see is not in any verdict."
        )
    if seeds:
        told = f"{min(seeds)} to {max(seeds)}" if len(seeds) > 1 else str(min(seeds))
        limits.append(
            f"Training seeds per variant: {told}. "
            + (
                "With one seed nothing tells a recipe from its seed: there are no intervals."
                if max(seeds) < 2
                else "Their wobble is pooled over the variants, as if all wobble alike; a variant "
                "that wobbles more keeps its own."
            )
        )
    else:
        limits.append("No cell is finished: it shows nothing yet.")
    unfinished = [cell for cell in study.cells if cell.status != DONE]
    if unfinished:
        names = ", ".join(f"{cell.variant} seed {cell.seed}" for cell in unfinished)
        limits.append(
            f"Cells not finished, and in no number: {names}. A run that failed because its "
            "training diverged is missing in the same way: look at why before you read the rest."
        )
    codes = {cell.code_hash for cell in study.cells if cell.status == DONE}
    if len(codes) > 1:
        limits.append(
            f"Finished cells were made by {len(codes)} states of the code: {', '.join(codes)}."
        )
    asked = {takeaway.number for takeaway in takeaways}
    if silent := [str(n) for n in TAKEAWAYS if n not in asked]:
        limits.append(f"It was not made to answer takeaway {', '.join(silent)}.")
    open_ = [t for t in takeaways if t.verdict == "undecided"]
    for takeaway in open_:
        needs = [c.needs for c in takeaway.contrasts if c.needs]
        told = takeaway.lacks or (f"needs {needs[0]}" if needs else "")
        limits.append(f"Takeaway {takeaway.number} is open{': ' + told if told else ''}.")
    if any(t.number == 3 for t in takeaways) and not any(
        key.startswith("probe/score/") for cell in study.cells for key in cell.curves
    ):
        limits.append("No probes were logged: nothing is known about the way to the final student.")
    absent = [title for task, title in TASK_TITLES.items() if task not in study.tasks]
    if absent and study.rows:
        limits.append(f"Not evaluated: {', '.join(absent).lower()}.")
    return limits
