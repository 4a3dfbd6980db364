"""The doctor for CUDA: every fast path against the plain one, then speed, on the GPU of this machine.

python bench/gpu.py                        in at most 8 minutes: a table, out/gpu/gpu.md and out/gpu/gpu.json
python bench/gpu.py --only graphs,decode   some of it
python bench/gpu.py --by-shape             the same list without a GPU: the branches for CUDA computed by the CPU in
                                           small shapes, and the work of real shapes counted

It ends with 0 where all that ran has passed, with 1 where something failed, with 2 without CUDA. PyTorch, transformers
(for what comes with it) and einops are enough; what needs a package that is missing is not run. Where the project is
not installed, from its folder: PYTHONPATH=. python bench/gpu.py
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import gpu_attention
import gpu_checks
import gpu_decoding
import gpu_shape
import gpu_speed
import gpu_training
import torch
from gpu_place import Finding, NotRun, Place, branches_for_cuda, number

Check = Callable[[Place], Iterator[Finding]]
MODULES = (gpu_checks, gpu_attention, gpu_decoding, gpu_training, gpu_speed)
CHECKS: dict[str, Check] = {name: check for module in MODULES for name, check in module.CHECKS.items()}
PASSED, FAILED, NOT_RUN, MEASURED = "passed", "FAILED", "not run", "measured"
MINUTES = 8.0
# That these may take on a card.
SECONDS = {"compiled": 90, "ranks": gpu_training.SECONDS, "train_64m": 90, "train_1b_moe": 150}


@dataclass
class Row:
    """What became of a check. verdict: one of the four words above; why: of a check that found nothing."""

    name: str
    what: str
    verdict: str
    seconds: float = 0.0
    why: str = ""
    findings: list[Finding] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Return findings in one line; of those with a bound the ones that exceed it, or the closest."""
        bad = [str(finding) for finding in self.findings if not finding.passed]
        bounded = [finding for finding in self.findings if finding.bound is not None]
        shown = (
            bad
            or [str(max(bounded, key=lambda one: one.value / one.bound if one.bound else one.value))][: len(bounded)]
            if bounded
            else []
        )
        shown += [str(finding) for finding in self.findings if finding.bound is None]
        return "; ".join([*([self.why] if self.why else []), *shown])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="NAME,...", help=f"of {', '.join(CHECKS)}")
    parser.add_argument("--by-shape", action="store_true", help="without a GPU")
    parser.add_argument("--out", default="out/gpu", help="folder of gpu.md and gpu.json")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(CHECKS)
    if unknown := [name for name in names if name not in CHECKS]:
        print(f"error: --only {','.join(unknown)}: no such check; one of {', '.join(CHECKS)}", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.by_shape else options.device)
    if device.type == "cuda" and (fault := why_not()):
        print(f"no CUDA here ({fault}); --by-shape checks what can be checked without", file=sys.stderr)
        return 2
    place = Place(torch.device("cuda", 0) if device.type == "cuda" else device, timed=not options.by_shape)
    rows = run(place, names)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    title = machine(place)
    (folder / "gpu.md").write_text(page(title, rows), "utf8")
    content = {"machine": title, "rows": [{**asdict(row), "text": row.text} for row in rows]}
    (folder / "gpu.json").write_text(json.dumps(content, ensure_ascii=False, indent=2), "utf8")
    failed = [row.name for row in rows if row.verdict == FAILED]
    print(f"{folder}/gpu.md: {len(failed)} of {len(rows)} failed{': ' + ', '.join(failed) if failed else ''}")
    return 1 if failed else 0


def why_not() -> str:
    """Return why CUDA cannot be used; nothing where it can."""
    if torch.version.hip:
        return "this torch is built for AMD GPUs"
    if torch.version.cuda is None:
        return "this torch is built for CPUs"
    return "" if torch.cuda.is_available() else "torch finds no GPU or no driver"


def run(place: Place, names: list[str]) -> list[Row]:
    """Run the checks of these names, each whatever became of the others, while there is time; print each."""
    torch.set_float32_matmul_precision("highest")
    end, rows = time.monotonic() + 60 * MINUTES, []
    for name in names:
        late = time.monotonic() > end - (0 if place.small else SECONDS.get(name, 0))
        rows.append(Row(name, doc(name), NOT_RUN, why=f"{MINUTES:g} minutes are over") if late else judge(name, place))
        row = rows[-1]
        print(f"{row.verdict:<8} {name:<14} {row.seconds:5.1f} s  {row.text}", flush=True)
    return rows


def judge(name: str, place: Place) -> Row:
    """Run one check."""
    row, start = Row(name, doc(name), NOT_RUN), time.monotonic()
    check = CHECKS[name] if place.timed else gpu_shape.CHECKS.get(name, CHECKS[name])
    torch.manual_seed(0)
    try:
        with branches_for_cuda(place):
            for finding in check(place):
                row.findings.append(finding)
        judged = [finding for finding in row.findings if finding.bound is not None]
        row.verdict = MEASURED if not judged else PASSED if all(one.passed for one in judged) else FAILED
    except NotRun as reason:
        row.why = str(reason)
    except ImportError as missing:
        row.why = f"{missing.name or missing} is not installed"
    except torch.OutOfMemoryError:
        row.why = "not enough memory"
    except NotImplementedError as missing:  # by shape it may be an operation that this torch has on CUDA alone
        row.verdict, row.why = NOT_RUN if place.small else FAILED, first_line(missing)
    except Exception as error:  # a card that refuses a kernel must not end the others
        row.verdict, row.why = FAILED, first_line(error)
    if row.why and any(not finding.passed for finding in row.findings):
        row.verdict = FAILED
    place.clear()
    row.seconds = time.monotonic() - start
    return row


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"


def doc(name: str) -> str:
    return (CHECKS[name].__doc__ or "").partition("\n")[0].rstrip(".")


def machine(place: Place) -> str:
    """Return the card, its memory, and what drives it."""
    if place.small:
        return f"by shape, on a CPU; torch {torch.__version__}"
    facts = torch.cuda.get_device_properties(place.device)
    return (
        f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, sm{facts.major}{facts.minor}, "
        f"{torch.cuda.device_count()} of them; torch {torch.__version__}, CUDA {torch.version.cuda}"
    )


def page(title: str, rows: list[Row]) -> str:
    """Return the table in Markdown, and below it every number."""
    lines = [f"# {title}", "", "| check | what | verdict | found |", "|---|---|---|---|"]
    cell = lambda text: text.replace("|", "\\|")  # noqa: E731
    lines += [f"| `{row.name}` | {cell(row.what)} | {row.verdict} | {cell(row.text)} |" for row in rows]
    for row in rows:
        lines += ["", f"**{row.name}** ({row.seconds:.1f} s)", ""]
        lines += [f"- {finding.what}: {number(finding.value)} {finding.unit}".rstrip() for finding in row.findings]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
