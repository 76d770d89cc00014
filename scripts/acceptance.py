#!/usr/bin/env python3
"""Run timm's own tests, which nobody here wrote, on SUGAR models: one architecture or more of every timm model family.

    python scripts/acceptance.py --jobs 2                    # every family; writes results/acceptance.csv
    python scripts/acceptance.py --quick                     # six families, nothing written
    python scripts/acceptance.py --families vgg regnet --models resnet18
    python scripts/acceptance.py --sdist timm-1.0.31.tar.gz  # instead of downloading it from the package index

The tests come from the source distribution of the installed timm; its code does not. They build, run forward and
backward, script with TorchScript, trace with torch.fx, extract features, and check each configuration. Where a test
fails on a SUGAR model it is run on the base model too. Known failures stand in EXPECTED with a reason; any other
failure, and any of these that passes, ends the run with exit status 1. Not run are timm's tests of pretrained weights
(they need the network) and of pruning (minutes for each model; timm leaves it out of its own CI).
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import timm
import torch

from timm_sugar.models import sugar as models

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "acceptance.csv"

# Architectures of each family (module of timm.models), separated by blanks: the smallest, by parameters and image size.
FAMILIES = {
    "beit": "beit_base_patch16_224",
    "byoanet": "halonet_h1",
    "byobnet": "test_byobnet",
    "cait": "cait_xxs24_224",
    "coat": "coat_lite_tiny",
    "conv2next": "conv2next_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "convnext_atto test_convnext2",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "test_efficientnet efficientnet_lite0",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "eva02_tiny_patch14_224",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "hieradet_small",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "test_mambaout",
    "maxxvit": "test_coatnet test_maxvit",
    "metaformer": "poolformer_s12",
    "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilenetv5": "mobilenetv5_300m",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_gap",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "test_nfnet",
    "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m0_9",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": "test_resnet resnet18",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small",
    "vgg": "vgg11",
    "visformer": "visformer_tiny",
    "vision_transformer": "test_vit",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "test_vit_relpos",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p16_224",
}
QUICK = ("resnet", "convnext", "swin_transformer", "vgg", "vision_transformer", "efficientnet")


@dataclass(frozen=True)
class Expected:
    """A known failure: of which test on which architecture (base name), why, and whether the base fails too."""

    test: str
    base: str
    reason: str
    base_fails_too: bool


EXPECTED: tuple[Expected, ...] = ()


@dataclass
class Outcome:
    """What timm's tests said about one architecture: test name -> passed, failed or skipped."""

    base: str
    family: str
    left_out: str = ""
    results: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def failed(self) -> list[str]:
        return [test for test, result in self.results.items() if result == "failed"]


def _download_sdist(folder: Path) -> Path:
    """Fetch timm's source distribution with pip. Raises OSError if that fails."""
    command = ["download", "-q", "--no-deps", "--no-binary", "timm", f"timm=={timm.__version__}", "-d", str(folder)]
    done = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True, check=False)
    found = sorted(folder.glob("timm-*.tar.gz"))
    if done.returncode or not found:
        raise OSError(f"pip can't download timm {timm.__version__}'s sdist: {(done.stderr.splitlines() or ['?'])[-1]}")
    return found[0]


def unpack_tests(sdist: Path, folder: Path) -> Path:
    """Unpack the tests of an sdist, and timm's settings for pytest, without its code; return where test_models.py is.

    Raises OSError or tarfile.TarError if the file is none, ValueError if it is another version's than installed.
    """
    with tarfile.open(sdist) as archive:
        top = archive.getnames()[0].partition("/")[0]
        if top != f"timm-{timm.__version__}":
            raise ValueError(f"{sdist} holds {top}, but timm {timm.__version__} is installed")
        wanted = [m for m in archive.getmembers() if m.name.startswith((f"{top}/tests/", f"{top}/pyproject.toml"))]
        archive.extractall(folder, wanted, filter="data")
    return folder / top / "tests" / "test_models.py"


def run_tests(test_file: Path, bases: list[str], suffix: str, jobs: int, only: str = "") -> Path:
    """Run timm's tests on `<base><suffix>` of every base, as a process; return the JUnit file that pytest wrote.

    Raises OSError if pytest could not run at all.
    """
    report = test_file.parent / f"report{suffix}.xml"
    environment = os.environ | {"TIMM_SUGAR_BASES": ",".join(bases), "TIMM_SUGAR_SUFFIX": suffix}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    paths = [str(ROOT / "tests" / "library"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    chosen = "not prune_intermediate_layers_contract" + (f" and ({only})" if only else "")
    command = ["-m", "pytest", "-p", "timm_plugin", "-p", "no:cacheprovider", "-q", "--tb=line", "-W", "ignore"]
    command += ["-k", chosen, f"--junitxml={report}", *(["-n", str(jobs)] if jobs > 1 else []), str(test_file)]
    done = subprocess.run([sys.executable, *command], cwd=test_file.parents[1], env=environment, check=False)
    if done.returncode not in (0, 1) or not report.exists():  # 1: some test failed
        raise OSError(f"pytest ended with status {done.returncode}")
    return report


def read_report(report: Path, outcomes: dict[str, Outcome], suffix: str) -> None:
    """Enter what a JUnit file says into the outcomes, which are by base name."""
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        test, _, parameters = case.get("name", "").partition("[")
        tagged = parameters.rstrip("]").partition("-")[2] or parameters.rstrip("]")
        name, _, tag = tagged.partition(".")
        outcome = outcomes[name.removesuffix(suffix)]
        key = f"{test} ({tag})" if tag else test
        problem = next((child for child in case if child.tag in ("failure", "error")), None)
        skipped = any(child.tag == "skipped" for child in case)
        outcome.results[key] = "failed" if problem is not None else "skipped" if skipped else "passed"
        if problem is not None:
            outcome.messages[key] = " ".join(problem.get("message", "").split())[:200]


def judge(outcome: Outcome, on_base: Outcome) -> tuple[list[str], list[str]]:
    """Compare the failures of a model with EXPECTED; return the reasons of known failures, and what is unexpected."""
    reasons, unexpected = [], []
    known = {entry.test: entry for entry in EXPECTED if entry.base == outcome.base}
    for test in outcome.failed():
        base_fails = on_base.results.get(test) == "failed"
        entry = known.get(test.partition(" ")[0])
        if entry is None:
            also = "the base fails too" if base_fails else "the base passes"
            unexpected.append(f"{outcome.base}: {test} failed, {also}: {outcome.messages[test]}")
        elif entry.base_fails_too != base_fails:
            unexpected.append(f"{outcome.base}: {test}: EXPECTED is wrong about whether the base fails too")
        else:
            reasons.append(f"{test}: {entry.reason}" + (" (the base fails too)" if base_fails else ""))
    failed = {test.partition(" ")[0] for test in outcome.failed()}
    unexpected += [f"{outcome.base}: {test} passed, though EXPECTED has it" for test in known if test not in failed]
    if not outcome.left_out and "passed" not in outcome.results.values():
        unexpected.append(f"{outcome.base}: no test passed")
    return reasons, unexpected


def _left_out_reason(base: str) -> str:
    reasons = [reason for pattern, reason in models.LEFT_OUT.items() if fnmatch.fnmatchcase(base, pattern)]
    return f"left out: {reasons[0]}" if reasons else ""


def choose(families: list[str], names: list[str]) -> dict[str, Outcome]:
    """The architectures to test, as empty outcomes by base name. Raises ValueError for an unknown family or name."""
    of_timm = {family for family in timm.list_modules() if family != models.__name__.rpartition(".")[2]}
    if of_timm != FAMILIES.keys():
        raise ValueError(f"FAMILIES and timm disagree about {', '.join(sorted(of_timm ^ FAMILIES.keys()))}")
    unknown = [family for family in families if family not in FAMILIES]
    unknown += [name for name in names if name.removesuffix(models.SUFFIX) not in timm.list_models()]
    if unknown:
        raise ValueError(f"timm has no family or model {unknown[0]!r}")
    bases = {base: family for family in families for base in FAMILIES[family].split()}
    for name in names:
        base = name.removesuffix(models.SUFFIX)
        bases[base] = next(family for family in FAMILIES if timm.models.is_model_in_modules(base, {family}))
    return {base: Outcome(base, family, _left_out_reason(base)) for base, family in bases.items()}


def run(outcomes: dict[str, Outcome], sdist: Path | None, jobs: int) -> dict[str, Outcome]:
    """Run timm's tests on all SUGAR models, into their outcomes; return those of failed tests on the base models."""
    on_base = {base: Outcome(base, outcome.family) for base, outcome in outcomes.items()}
    with tempfile.TemporaryDirectory() as temporary:
        test_file = unpack_tests(sdist or _download_sdist(Path(temporary)), Path(temporary))
        bases = [base for base, outcome in outcomes.items() if not outcome.left_out]
        if bases:
            read_report(run_tests(test_file, bases, models.SUFFIX, jobs), outcomes, models.SUFFIX)
        failed = defaultdict(set)
        for base in bases:
            for test in outcomes[base].failed():
                failed[test.partition(" ")[0]].add(base)
        if failed:
            print("the failed tests on base models:", flush=True)
            affected = sorted({base for bases in failed.values() for base in bases})
            read_report(run_tests(test_file, affected, "", jobs, " or ".join(failed)), on_base, "")
    return on_base


def write_csv(rows: list[dict[str, object]]) -> None:
    """Write results/acceptance.csv: a row for each architecture."""
    RESULTS.parent.mkdir(exist_ok=True)
    partial = RESULTS.with_suffix(".tmp")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(RESULTS)


def report(outcomes: dict[str, Outcome], on_base: dict[str, Outcome]) -> tuple[list[dict[str, object]], list[str]]:
    """Print a table; return the rows of the CSV and all that was unexpected."""
    rows, unexpected = [], []
    print(f"{'family':<26}{'model':<40}{'passed':>8}{'failed':>8}{'skipped':>8}")
    for base, outcome in outcomes.items():
        counts = Counter(outcome.results.values())
        reasons, surprises = judge(outcome, on_base[base])
        unexpected += surprises
        numbers = {result: counts[result] for result in ("passed", "failed", "skipped")}
        row = {"family": outcome.family, "model": base + models.SUFFIX, **numbers}
        versions = {"timm": timm.__version__, "torch": torch.__version__}
        rows.append(row | {"reason": "; ".join([outcome.left_out] * bool(outcome.left_out) + reasons)} | versions)
        print(f"{row['family']:<26}{row['model']:<40}" + "".join(f"{count:>8}" for count in numbers.values()))
    return rows, unexpected


def _arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", metavar="NAME", help="modules of timm.models (default: all)")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="these architectures, besides --families if given")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--sdist", type=Path, metavar="FILE", help="timm's source distribution (default: download it)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (default: 1)")
    args = parser.parse_args()
    if args.quick and (args.families or args.models):
        parser.error("--quick chooses the families itself: leave out --families and --models")
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, not {args.jobs}")
    return parser, args


def main() -> int:
    parser, args = _arguments()
    everything = not (args.families or args.models or args.quick)
    families = list(FAMILIES) if everything else list(QUICK) if args.quick else args.families or []
    start = time.perf_counter()
    try:
        outcomes = choose(families, args.models or [])
        on_base = run(outcomes, args.sdist, args.jobs)
    except (OSError, ValueError, tarfile.TarError) as error:
        parser.error(" ".join(str(error).split()))
    rows, unexpected = report(outcomes, on_base)
    for line in unexpected:
        print(f"UNEXPECTED {line}")
    if everything:
        write_csv(rows)
        print(f"wrote {RESULTS.relative_to(ROOT)}")
    print(f"{len(rows)} architectures, {len(unexpected)} unexpected results, {time.perf_counter() - start:.0f} s")
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main())
