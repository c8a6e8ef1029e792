"""The router's benchmark: figures of merit against scikit-learn and by hand, the loaders, and the whole command.

No quality and no speed is asserted of what is measured: only that every figure is there and is a number.
"""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from benchmarks.figures import Bar, Measurement, SeedMeasurement
from benchmarks.linear_router import Centroids, Linear
from benchmarks.router import main
from benchmarks.router_data import SOURCES, Texts, domain_name, few_of_each_intent, load, split_off_calibration
from benchmarks.router_latency import Prompts, among_random_domains
from benchmarks.router_metrics import auroc, calibration_error, false_positive_rate, log_softmax, log_sum_exp
from benchmarks.router_quality import judge, judge_linear
from benchmarks.router_report import PRETRAINED_NAMES, RESULT_NAMES, bars, for_result
from benchmarks.router_sentences import RememberingModel
from cluster.config.training import RouterSettings
from cluster.errors import InvalidData, InvalidInput
from cluster.router.encoder import NOVEL_WIDTH
from cluster.router.tiny_ada import TinyAda
from tests.router.prompts import DOMAINS, STRANGE, prompts
from tests.router.small_bert import small_bert, write_small_bert

NUM_INTENTS = 3

Rows = dict[str, list[str]]


def _rows(num_train: int = 24, num_val: int = 12) -> Rows:
    """Texts of four domains with three intents each, and some of no domain, like CLINC150's."""
    rows: Rows = {"text": [], "domain": [], "intent": [], "split": []}
    for split, number in (("train", num_train), ("val", num_val), ("test", 2)):
        texts, domains = prompts("train" if split == "train" else "val", number)
        rows["text"] += texts
        rows["domain"] += domains
        rows["intent"] += [f"{domain}_{index % NUM_INTENTS}" for index, domain in enumerate(domains)]
        rows["split"] += [split] * len(texts)
    for split in ("oos_train", "oos_val"):
        rows["text"] += STRANGE
        for column in ("domain", "intent"):
            rows[column] += ["oos"] * len(STRANGE)
        rows["split"] += [split] * len(STRANGE)
    return rows


def _write(folder: Path, name: str, rows: Rows) -> None:
    """As the data set `name` of `SOURCES`."""
    source = SOURCES[name]
    columns = {source.text: rows["text"], source.domain: rows["domain"], "split": rows["split"]}
    if source.intent is not None:
        columns[source.intent] = rows["intent"]
    file = folder / source.files.replace("*", "all")
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """All data sets."""
    for name in SOURCES:
        _write(tmp_path, name, _rows())
    return tmp_path


@pytest.mark.parametrize("num_values", [3, 1000])
def test_auroc_is_that_of_scikit_learn_with_ties_and_without(num_values: int) -> None:
    rng = np.random.default_rng(num_values)
    inside = rng.integers(1, num_values, 50) / num_values
    outside = rng.integers(0, num_values - 1, 30) / num_values
    truth = [1] * 50 + [0] * 30
    assert auroc(inside, outside) == pytest.approx(roc_auc_score(truth, np.concatenate((inside, outside))))


def test_auroc_by_hand() -> None:
    # Of the six pairs four are in order and one is equal.
    assert auroc(np.array([3.0, 2.0]), np.array([1.0, 2.0, 2.5])) == pytest.approx(4.5 / 6)
    assert auroc(np.array([1.0]), np.array([0.0])) == 1


def test_false_positives_are_counted_at_the_threshold_of_scikit_learns_curve() -> None:
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(1, 1, 200), rng.normal(0, 1, 300)
    rates, found, _ = roc_curve([1] * 200 + [0] * 300, np.concatenate((inside, outside)), drop_intermediate=False)
    assert false_positive_rate(inside, outside) == pytest.approx(rates[np.argmax(found >= 0.95 - 1e-9)])


def test_false_positives_by_hand() -> None:
    inside = np.arange(1.0, 21.0)
    # 19 of 20 are let in by a threshold of 2.
    assert false_positive_rate(inside, np.array([0.0, 1.9, 2.0, 30.0])) == 0.5
    assert false_positive_rate(inside, np.array([1.9]), true_positive_rate=1.0) == 1.0


def test_calibration_error_by_hand() -> None:
    # Bin 3 of 5: mean confidence 0.5, half right. Bin 5: mean 0.95, none of two right. The bin of an edge is below it.
    confidence = np.array([0.45, 0.55, 0.9, 1.0, 0.2])
    correct = np.array([True, False, False, False, True])
    expected = 2 / 5 * 0.0 + 2 / 5 * 0.95 + 1 / 5 * 0.8
    assert calibration_error(confidence, correct, num_bins=5) == pytest.approx(expected)
    assert calibration_error(np.array([1.0, 0.0]), np.array([True, False])) == 0


def test_softmax_is_that_of_torch_also_for_large_logits() -> None:
    logits = np.array([[1000.0, 999.0, -5.0], [0.0, 0.0, 0.0]])
    tensor = torch.from_numpy(logits)
    assert np.allclose(log_softmax(logits), tensor.log_softmax(1).numpy())
    assert np.allclose(log_sum_exp(logits), tensor.logsumexp(1).numpy())


def test_the_mean_over_seeds_counts() -> None:
    assert SeedMeasurement((0.5, 0.5, 0.8)).value == pytest.approx(0.6)
    assert not SeedMeasurement((0.5, 0.5, 0.8)).reaches(Bar(0.61))


def test_a_bar_may_be_what_the_baseline_reached() -> None:
    figures = {"baseline_hwu_accuracy": Measurement((0.7,)), "hwu_accuracy": Measurement((0.71,))}
    assert figures["hwu_accuracy"].reaches(bars(figures, 0.01)["hwu_accuracy"])
    assert "mmlu_accuracy" not in bars(figures, 0.01)
    assert list(for_result(figures | {"other": Measurement((1.0,))})) == ["hwu_accuracy", "baseline_hwu_accuracy"]


def test_official_splits_are_kept_apart(folder: Path) -> None:
    rows = _rows()
    data = load("clinc", folder)
    for split, texts in (("train", data.train), ("val", data.val)):
        of_split = [index for index, name in enumerate(rows["split"]) if name == split]
        assert texts.texts == [rows["text"][index] for index in of_split]
        assert texts.domains == [rows["domain"][index] for index in of_split]
        assert texts.intents == [rows["intent"][index] for index in of_split]
        assert set(texts.domains) == set(DOMAINS)
    assert data.outside == list(STRANGE)


def test_rows_are_limited_by_domain(folder: Path) -> None:
    data = load("clinc", folder, most_rows=20)
    assert all(data.train.domains.count(domain) == 5 for domain in DOMAINS)
    assert load("clinc", folder, most_rows=20) == data
    assert load("clinc", folder, most_rows=10_000) == load("clinc", folder)


def test_calibration_is_a_twentieth_of_every_intent_and_depends_on_the_seed() -> None:
    texts = Texts([str(number) for number in range(101)], ["a"] * 60 + ["b"] * 41, ["x"] * 60 + ["y"] * 40 + ["z"])
    learned, calibration = split_off_calibration(texts, seed=3)
    assert sorted(learned.texts + calibration.texts) == sorted(texts.texts)
    assert [calibration.intents.count(intent) for intent in "xyz"] == [3, 2, 0]
    assert split_off_calibration(texts, seed=3) == (learned, calibration)
    assert split_off_calibration(texts, seed=4)[1] != calibration


def test_few_examples_of_each_intent() -> None:
    texts = Texts([str(number) for number in range(13)], ["a"] * 13, ["x"] * 10 + ["y"] * 3)
    few = few_of_each_intent(texts, 5, seed=0)
    assert [few.intents.count(intent) for intent in "xy"] == [5, 3]
    assert len(set(few.texts)) == 8


def test_labels_become_names_of_domains() -> None:
    assert domain_name("sgd/RentalCars") == "sgd-rentalcars"
    assert domain_name("tutorial/c++") != domain_name("tutorial/c")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"domain": None}, "lacks|cannot be read"),
        ({"domain": ["Law", "law"] * 4}, "same domain name"),
        ({"text": [None] * 8}, "without a value"),
        ({"split": ["train"] * 8}, "'val'"),
    ],
)
def test_data_that_cannot_be_is_refused(tmp_path: Path, change: dict[str, list[str] | None], said: str) -> None:
    rows = {"text": ["hello"] * 8, "domain": ["law"] * 8, "intent": ["x"] * 8, "split": ["train"] * 4 + ["val"] * 4}
    columns = {name: values for name, values in {**rows, **change}.items() if values is not None}
    (tmp_path / "clinc150").mkdir()
    pq.write_table(pa.table(columns), tmp_path / SOURCES["clinc"].files)
    with pytest.raises(InvalidData, match=said):
        load("clinc", tmp_path)
    with pytest.raises(InvalidInput, match="--data"):
        load("hwu", tmp_path)


def test_the_baseline_learns_and_is_surer_of_what_it_knows() -> None:
    linear = Linear().fit(*prompts("train", 40))
    texts, domains = prompts("val", 20)
    assert linear.domains == DOMAINS
    assert np.allclose(np.exp(linear.scores(texts)).sum(axis=1), 1)
    assert np.allclose(linear.certainty(texts), np.exp(linear.scores(texts)).max(axis=1))
    for by_energy in (False, True):
        judged, outside = judge_linear(linear, texts, by_energy), judge_linear(linear, STRANGE, by_energy)
        assert judged.accuracy(domains) > 0.9
        assert auroc(judged.inside_B, outside.inside_B) > 0.8


def test_the_baselines_other_solver_gives_the_same_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    texts, domains = prompts("train", 40)
    usual = Linear().fit(texts, domains)
    monkeypatch.setattr("benchmarks.linear_router._MOST_WEIGHTS_OF_LBFGS", 0)
    other = Linear().fit(texts, domains)
    judged = [judge_linear(linear, texts, by_energy=False) for linear in (usual, other)]
    assert not np.array_equal(judged[0].log_p_BD, judged[1].log_p_BD)
    assert np.allclose(judged[0].log_p_BD, judged[1].log_p_BD, atol=0.5)
    assert judged[0].accuracy(domains) == judged[1].accuracy(domains) == 1


def test_centroids_learn_a_domain_from_examples() -> None:
    texts, domains = prompts("train", 40)
    known = [index for index, domain in enumerate(domains) if domain != "music"]
    new = [index for index, domain in enumerate(domains) if domain == "music"]
    router = Centroids([texts[i] for i in known], [domains[i] for i in known], [domains[i] for i in known])
    assert "music" not in router.closest(texts)
    router.add([texts[i] for i in new], ["a", "b"] * (len(new) // 2), ["music"] * len(new))
    found = router.closest(texts)
    assert sum(one == other for one, other in zip(found, domains, strict=True)) > 0.95 * len(texts)


def test_what_tiny_ada_says_is_what_it_decides(ada: TinyAda) -> None:
    texts, domains = prompts("val", 20)
    texts += STRANGE
    domains += ["none"] * len(STRANGE)
    judged = judge(ada, texts)
    decisions = ada.route(texts)
    assert [bool(inside >= ada.policy.threshold) for inside in judged.inside_B] == [bool(d.weights) for d in decisions]
    best = [max(p for name, p in decision.probabilities.items() if name != "none") for decision in decisions]
    assert np.allclose(judged.probability_B, best, atol=1e-5)
    assert not judged.correct(domains)[-len(STRANGE) :].any()


def test_random_domains_leave_the_encoder_and_the_way_through_the_head_as_they_are(ada: TinyAda) -> None:
    grown = among_random_domains(ada, 50)
    with torch.inference_mode():
        logits, own = (router.logits(["Which spice goes with paper?"]) for router in (grown, ada))
    assert logits.shape == (1, 51)
    assert torch.isfinite(logits).all()
    assert len(set(logits[0, :50].tolist())) == 50
    # The usual number of prototypes, not the data's, and none of them without what is novel.
    assert grown.head.num_prototypes_D.tolist() == [RouterSettings().prototypes_per_domain] * 50
    assert grown.head.prototypes_DPV.shape[1] == RouterSettings().prototypes_per_domain
    assert (grown.head.prototypes_DPV[..., -NOVEL_WIDTH:].norm(dim=2) > 0.1).all()
    # None's logit reads no domain, and the router that was grown stays as it was.
    assert torch.equal(logits[0, -1], own[0, -1])
    assert len(ada.domains) == len(DOMAINS)


def test_prompts_are_new_and_as_long_as_asked() -> None:
    prompts_made = Prompts(["some words of a text"])
    made = [prompts_made.next(20) for _ in range(200)]
    assert len(set(made)) == 200
    assert {len(prompt.split()) for prompt in made} == {20}


@pytest.mark.parametrize("is_pretrained", [False, True])
def test_the_quick_run_gives_every_figure(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str], is_pretrained: bool
) -> None:
    kept = folder / "all.json"
    encoder = write_small_bert(tmp_path_factory.mktemp("small-bert")) if is_pretrained else "none"
    # With an encoder every scenario takes three times as long, and does the same to each kind of router.
    only = ["--only", "clinc", "latency"] if is_pretrained else []
    main(["--quick", "--data", str(folder), "--json", str(kept), "--pretrained", str(encoder), *only])
    captured = capsys.readouterr()
    last = captured.out.splitlines()[-1]
    assert last.startswith("RESULT ")
    result = json.loads(last.removeprefix("RESULT "))
    run = ("clinc", "p50", "p99", "train_s", "parameters") if is_pretrained else ("",)
    expected = tuple(
        name
        for name in RESULT_NAMES
        if any(part in name for part in run) and (is_pretrained or name not in PRETRAINED_NAMES)
    )
    assert tuple(result) == expected
    assert ("pretrained encoder" in captured.out) == is_pretrained
    assert all(math.isfinite(number) for number in result.values())
    figures = json.loads(kept.read_text())["figures"]
    assert set(expected) <= figures.keys()
    assert is_pretrained or "clinc_near_auroc" in figures
    assert {"clinc_false_rejection", "clinc_oos_auroc_by_probability"} <= figures.keys()


def test_the_curve_has_a_row_for_every_size_and_one_for_the_pretrained(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = write_small_bert(tmp_path_factory.mktemp("small-bert"))
    main(["--quick", "--data", str(folder), "--curve", str(folder / "curve.png"), "--pretrained", str(encoder)])
    out = capsys.readouterr().out
    assert all(word in out for word in ("6.5M", "25M", "500M", "scratch", "taught", "pretrained"))


def test_a_text_is_read_once_and_what_it_took_counts_every_time(tmp_path: Path) -> None:
    plain = small_bert(tmp_path)
    remembering = RememberingModel(plain)
    texts = ["Will it rain?", "Fry a lamp.", "Will it rain?"]
    first = remembering.embed(texts)
    assert torch.allclose(first, plain.embed(texts), atol=1e-6)
    saved_s = remembering.saved_s
    assert torch.equal(remembering.embed(texts[::-1]), first.flip(0))
    assert remembering.saved_s > saved_s
    assert remembering.forgetful() is plain
    assert remembering.num_parameters == plain.num_parameters


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "nowhere"], "There is no data set"),
        (["--data", "nowhere", "--only", "hwu"], "There is no hwu64"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--base-parameters", "-1"], "--base-parameters is -1"),
        (["--json", "nowhere/all.json"], "whose folder does not exist"),
        (["--pretrained", "nowhere"], "no installed package 'nowhere'"),
    ],
)
def test_errors_of_the_user_are_one_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 1
    captured = capsys.readouterr()
    assert said in captured.err.replace("\n", " ")
    assert captured.out == ""
