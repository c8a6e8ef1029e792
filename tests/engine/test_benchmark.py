"""The engine's benchmark: its arithmetic against figures worked out by hand, and the whole command on a tiny model.

No speed is asserted here: only that every figure is there and is a number.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.client import Played
from benchmarks.engine import main
from benchmarks.figures import Bar, Measurement, interleaved, paired_ratios, percentile, share_allowed
from benchmarks.system import domain, in_turn
from benchmarks.workload import Workload
from cluster.config.places import CHECKOUT
from cluster.messages import Mixture
from tests.engine.systems import tokenizer

NAMES = [
    "base_1",
    "base_8",
    "base_16",
    "mixed8_1",
    "mixed8_8",
    "mixed8_16",
    "distinct16_over_same16",
    "mix3_over_single",
    "idle_adapters_over_none",
    "cliff_throughput",
    "cliff_ttft",
    "int8_over_bf16_1",
    "int8_memory",
    "int8_ppl_rise",
    "int4_over_bf16_1",
    "int4_ppl_rise",
    "ttft_p99_over_p50",
    "peft_base_1",
    "peft_base_8",
    "peft_base_16",
    "peft_mixed8_1",
    "peft_mixed8_8",
    "peft_mixed8_16",
    "vllm_base_1",
    "vllm_base_8",
    "vllm_base_16",
]

PEER = """
import argparse, json
parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--adapters", type=int, default=0)
adapters = parser.parse_args().adapters
assert not (FAILS and adapters), "out of slots"
for n in (1, 8, 16):
    print("RESULT " + json.dumps({"adapters": adapters, "concurrency": n, "tokens_per_s": 100.0 * n + adapters}))
"""


def test_runs_take_turns_and_every_second_round_goes_backwards() -> None:
    order: list[str] = []
    values = iter(range(6))
    results = interleaved({"a": lambda: next(values), "b": lambda: next(values)}, 3, order.append)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert results == {"a": (0, 3, 4), "b": (1, 2, 5)}


def test_a_ratio_is_the_median_of_the_rounds_and_not_of_the_medians() -> None:
    # A machine that is three times as slow in the second round, and a third of that again in the last.
    ours, theirs = (100.0, 30.0, 12.0), (200.0, 60.0, 48.0)
    assert Measurement(paired_ratios(ours, theirs)).value == 0.5


def test_a_bound_is_the_time_left_after_reading_more_bytes() -> None:
    # A step of 60 ms that must read 400 MB more at 20 GB/s takes 80 ms.
    assert share_allowed(0.060, 400e6, 20e9) == pytest.approx(0.75)
    assert Measurement((0.7,), bound=0.75).reaches(Bar(0.9, of_bound=True))
    assert not Measurement((0.7,), bound=0.75).reaches(Bar(0.75))
    assert not Measurement((2.5,)).reaches(Bar(2.0, at_most=True))


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1.0), (0.5, 50.0), (0.99, 99.0), (1.0, 100.0)])
def test_a_percentile_is_one_of_the_values(share: float, expected: float) -> None:
    assert percentile([float(value) for value in range(100, 0, -1)], share) == expected


def test_rates_are_tokens_over_seconds() -> None:
    played = Played(made=[(2.0, 1), (3.0, 4), (4.0, 5)])
    assert played.tokens_per_s == 10 / 4
    assert played.decode_tokens_per_s == 9 / 2
    assert played.tokens_between(2.0, 3.0) == 4


def test_mixtures_in_turn_have_weights_that_sum_to_one() -> None:
    assert in_turn(8)(9) == Mixture.of({domain(1): 1.0})
    assert in_turn(8, num_mixed=3)(7) == Mixture.of({domain(7): 0.5, domain(0): 0.25, domain(1): 0.25})


def test_prompts_never_repeat_and_have_equal_lengths() -> None:
    workload = Workload(tokenizer(), new_tokens=4)
    runs = [workload.requests(n, lambda index: Mixture()) for n in (1, 16, 16, 1, 40, 8)]
    requests = [request for run in runs for request in run]
    assert len({request.prompt for request in requests}) == len({r.request_id for r in requests}) == len(requests)
    lengths = {len(tokenizer()(str(request.prompt))["input_ids"]) for request in requests}
    assert max(lengths) - min(lengths) <= 1  # foo9 and foo10


def test_the_quick_run_gives_every_figure(root: Path, tmp_path: Path) -> None:
    rows = {
        "domain": ["law"] * 8,
        "prompt": [f"is contract {i} valid" for i in range(8)],
        "response": ["the judge dismissed it"] * 8,
        "split": ["train", "test"] * 4,
    }
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    (tmp_path / "peft_generate.py").write_text("FAILS = False\n" + PEER)
    (tmp_path / "vllm_generate.py").write_text("FAILS = True\n" + PEER)
    command = [sys.executable, "-m", "benchmarks.engine", "--quick", "--threads", "1"]
    command += ["--quality-model", str(root), "--quality-data", str(tmp_path), "--json", str(tmp_path / "all.json")]
    command += ["--peers", "--peers-dir", str(tmp_path), "--vllm-python", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("RESULT ")
    result = json.loads(last.removeprefix("RESULT "))
    assert not set(NAMES) - result.keys()
    assert all(math.isfinite(number) for number in result.values())
    assert all(number > 0 for name, number in result.items() if not name.endswith("_rise"))
    # What the scripts of the peers said, and of the one that failed nothing but why.
    assert [result[f"peft_mixed8_{n}"] for n in (1, 8, 16)] == [108.0, 808.0, 1608.0]
    assert "vllm_mixed8_1" not in result
    assert "out of slots" in done.stderr
    figures = json.loads((tmp_path / "all.json").read_text())["figures"]
    assert {name for name in result if not name.endswith("_bound")} == figures.keys()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "benchmarks.random_model"),
        (["--model", "nowhere", "--only", "serving"], "There is no base/config.json"),
        (["--quick", "--only", "peers"], "needs --peers"),
        (["--quick", "--adapters", "0"], "--adapters is 0"),
        (["--quick", "--peers", "--peers-dir", "nowhere"], "There is no peft_generate.py"),
    ],
)
def test_errors_of_the_user_are_one_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--threads", "1"])
    assert ended.value.code == 1
    captured = capsys.readouterr()
    assert said in captured.err.replace("\n", " ")
    assert captured.out == ""
