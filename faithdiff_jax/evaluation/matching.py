"""Which restored picture belongs to which reference, by name: never two readings, and nothing left out silently.

Methods write 0001.png, 0001_out.png or 0001x4.png for 0001.png, and write all of a folder alike. So a folder has one
rule: what its names have after the picture's name. Of the rules that could be meant the one that fits most pictures is
taken; if two fit as many and pair them differently, none is.
"""

import itertools
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from faithdiff_jax.errors import InputError

# What names are known to have behind: a scale, a word for what the file is, the number of a sample.
_KNOWN = re.compile(
    r"(?:[-_ ]?x[1-8]|[-_ ][0-9]"
    r"|[-_ ](?:out|output|result|restored|enhanced|upscaled|pred|rlt|sr|hr|lr|hq|lq|gt)[1-8]?)$",
    re.IGNORECASE,
)
_SEPARATOR = re.compile(r"[-_ .]")
_MOST_KNOWN = 2  # of such endings on one another, as in 0001x4_out

Rule = tuple[str, str]
"""What names end in behind the picture's own: ours, theirs."""


@dataclass(frozen=True)
class Matching:
    """Files paired by name.

    Attributes:
        pairs: name of their file -> name of ours.
        rule: what ours and theirs have behind what they share.
        ours_left: files of ours that no file of theirs belongs to.
        theirs_left: files of theirs that no file of ours belongs to.
        doubt: why nothing was paired although names are alike; "" otherwise.
    """

    pairs: Mapping[str, str]
    rule: Rule = ("", "")
    ours_left: Sequence[str] = ()
    theirs_left: Sequence[str] = ()
    doubt: str = ""


@dataclass
class _Names:
    """The files of one side by stem; files that share a stem are not paired."""

    by_stem: dict[str, str] = field(default_factory=dict)
    doubles: list[str] = field(default_factory=list)


def stem(name: str) -> str:
    """A file's name without suffix, in one Unicode spelling (file systems differ there)."""
    return unicodedata.normalize("NFC", os.path.splitext(name)[0])


def match_names(ours: Iterable[str], theirs: Iterable[str], ending: str | None = None) -> Matching:
    """Pair files by their names.

    Args:
        ours: names of files, such as restored pictures.
        theirs: names of files, such as references.
        ending: what ours have behind the picture's name, before the file's suffix, where it is known.

    Raises:
        InputError: an ending that none of ours has.
    """
    mine, other = _by_stem(ours), _by_stem(theirs)
    if ending and not any(name.endswith(ending) for name in mine.by_stem):
        raise InputError(f"ending {ending!r}: no picture's name ends in it")
    found = _readings(mine.by_stem, other.by_stem, ending)
    most = max(map(len, found.values()), default=0)
    best = {rule: pairs for rule, pairs in found.items() if len(pairs) == most}
    different: list[Rule] = []
    for rule, pairs in best.items():
        if all(pairs != best[seen] for seen in different):
            different.append(rule)
    doubt, pairs, rule = "", {}, ("", "")
    if ("", "") in different and most == len(other.by_stem):
        rule = ("", "")  # every one of theirs has its namesake: other files are other versions
        pairs = best[rule]
    elif len(different) > 1:
        names = " or ".join(_in_words(rule) for rule in different[:3])
        doubt = f"names can be read in {len(different)} ways ({names}); say which with --ending, or rename the files"
    elif different:
        rule = different[0]
        pairs = best[rule]
    by_name = {other.by_stem[theirs_]: mine.by_stem[ours_] for theirs_, ours_ in pairs.items()}
    ours_left = sorted({*mine.by_stem.values(), *mine.doubles} - set(by_name.values()))
    theirs_left = sorted({*other.by_stem.values(), *other.doubles} - set(by_name))
    return Matching(by_name, rule, ours_left, theirs_left, doubt)


def _by_stem(names: Iterable[str]) -> _Names:
    grouped: dict[str, list[str]] = defaultdict(list)
    for name in names:
        grouped[stem(name)].append(name)
    found = _Names()
    for shared, files in grouped.items():
        if len(files) == 1:
            found.by_stem[shared] = files[0]
        else:
            found.doubles += files
    return found


def _readings(ours: Iterable[str], theirs: Iterable[str], ending: str | None) -> dict[Rule, dict[str, str]]:
    """Rule -> their stem -> our stem, for every rule by which there is a pair."""
    ours, theirs = list(ours), list(theirs)
    if ending is None:
        own = _decompositions(ours)
    else:
        own = {name: [(name.removesuffix(ending), ending)] for name in ours if name.endswith(ending)}
    by_base: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name, parts in _decompositions(theirs).items():
        for base, behind in parts:
            by_base[base].append((name, behind))
    found: dict[Rule, dict[str, str]] = defaultdict(dict)
    for name, parts in own.items():
        for base, behind in parts:
            for other, others in by_base.get(base, ()):
                if behind != others or not behind:
                    found[behind, others][other] = name
    return found


def _decompositions(names: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Every name as (base, ending) in each way that could be meant; the base is never empty."""
    shared = _shared_endings(names) if len(names) > 1 else []
    found = {}
    for name in names:
        endings = {"", *(ending for ending in shared if len(ending) < len(name))}
        base = name
        for _ in range(_MOST_KNOWN):
            match = _KNOWN.search(base)
            if not match or not match.start():
                break
            base = base[: match.start()]
            endings.add(name[len(base) :])
        found[name] = [(name[: len(name) - len(ending)], ending) for ending in sorted(endings)]
    return found


def _shared_endings(names: Sequence[str]) -> list[str]:
    """What all names end in, from each separator on."""
    first, last = min(names, key=_backwards)[::-1], max(names, key=_backwards)[::-1]
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    common = "".join(letter for letter, _ in alike)[::-1]
    return [common[match.start() :] for match in _SEPARATOR.finditer(common)]


def _backwards(name: str) -> str:
    return name[::-1]


def _in_words(rule: Rule) -> str:
    ours, theirs = rule
    if rule == ("", ""):
        return "the names as they are"
    return f"without {ours!r}" if not theirs else f"without {ours!r} and {theirs!r}"
