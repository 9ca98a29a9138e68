"""`fewstep cache`: encode what a recipe will ask for, before any network is loaded, and say so."""

from collections.abc import Mapping
from pathlib import Path

from fewstep.commands.opening import open_pipelines
from fewstep.data.tensorstore import Stored
from fewstep.errors import RecipeError
from fewstep.models.families.encoders import part_sizes
from fewstep.real.domain import RealDomain
from fewstep.recipe.facts import local_machine
from fewstep.recipe.load import load_recipe
from fewstep.recipe.plan import make_plan
from fewstep.session import progress, say

SHOWN = 8
"""Unused entries that are listed."""


def cache(
    recipe_path: Path,
    *,
    overrides: Mapping[str, str],
    verify: bool,
    prune: bool,
    dry_run: bool,
) -> None:
    """Encode the prompts and sources of a recipe for real models."""
    recipe = load_recipe(recipe_path, overrides)
    make_plan(recipe, local_machine())  # for its refusals
    if not recipe.model.is_real:
        raise RecipeError(
            f"there is nothing to encode beforehand for {recipe.model.family!r}",
            field="model.family",
            hint="`fewstep distill` keeps what it encodes by itself",
        )
    domain = RealDomain(recipe, open_pipelines(recipe), prepare=False)
    cache_conditions(domain, verify=verify, prune=prune, dry_run=dry_run)


def cache_conditions(domain: RealDomain, *, verify: bool, prune: bool, dry_run: bool) -> None:
    """`domain` has not encoded anything yet. A dry run opens no model and changes no file."""
    for line in domain.notices():
        say(line)
    tensors = domain.tensors
    if verify:
        tensors.verify()
    for shard in tensors.damaged:
        say(f"{shard} is damaged; what it held is encoded again")
    wanted = domain.wanted()
    jobs = list(domain.jobs(wanted))  # opens nothing yet
    keep = {key for job in jobs for sample in job.samples for key in job.store.keys(sample)}
    new = {key for key in keep if key not in tensors}
    say(f"{len(keep)} texts and images are wanted, {len(keep) - len(new)} are in {tensors.folder}")
    if dry_run:
        _estimate(domain)
    else:
        total = sum(len(job.store.missing(job.samples)) for job in jobs)
        del jobs
        added = 0
        with progress("encode", total) as advance:
            done = 0
            for job in domain.jobs(wanted):
                before = done

                def report(now: int, _: int, before: int = before) -> None:
                    nonlocal done
                    done = before + now
                    advance(done, "")

                added += job.store.fill(job.samples, job.open_encoders, progress=report).nbytes
        say(f"{len(new)} encoded, {len(keep) - len(new)} reused, {size(added)} written")
    unused = tensors.unused(keep)
    if unused:
        _tell_unused(unused, listed=prune)
    if prune and not dry_run:
        say(f"{size(tensors.prune(keep))} set free")


def _estimate(domain: RealDomain) -> None:
    """What encoding would add, and what a prompt takes in the recipe's families."""
    missing: dict[str, int] = {}
    families: dict[str, str] = {}
    for job in domain.jobs(domain.wanted()):
        sizes = part_sizes(job.folder, domain.pipelines.dtype)
        missing |= job.store.estimate(job.samples, sizes)
        length = "any" if sizes.length is None else str(sizes.length)
        families[str(job.folder)] = (
            f"{job.store.encoding.family}: {size(sizes.token)} a text token ({length} tokens a "
            f"prompt), {size(sizes.source)} and {sizes.source_tokens} text tokens a source"
        )
    for line in families.values():
        say(line)
    say(f"{len(missing)} would be encoded, about {size(sum(missing.values()))}")


def _tell_unused(unused: Mapping[str, Stored], *, listed: bool) -> None:
    total = size(sum(stored.nbytes for stored in unused.values()))
    if not listed:
        say(f"{len(unused)} entries ({total}) are not used by this recipe; --prune deletes them")
        return
    say(f"{len(unused)} entries ({total}) are not used by this recipe:")
    for stored in list(unused.values())[:SHOWN]:
        say(f"  {stored.info['about']}")
    if len(unused) > SHOWN:
        say(f"  and {len(unused) - SHOWN} more")


def size(nbytes: float) -> str:
    """12345678 -> '12.3 MB'."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while nbytes >= 1000 and len(units) > 1:
        nbytes, units = nbytes / 1000, units[1:]
    return f"{nbytes:.3g} {units[0]}"
