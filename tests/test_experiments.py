"""The papers' tables: arms that build, folds that keep their tests apart, runs that resume, tables by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from conftest import draw_tissue
from nuguide import checkpoint
from nuguide.datasets import Dataset, Entry
from nuguide.datasets.splits import read_manifest
from nuguide.evaluate import read_scores
from nuguide.experiments import run as runner
from nuguide.experiments.beside import classical, otsu_watershed, people
from nuguide.experiments.cli import main
from nuguide.experiments.figures import bars, components, encodings, forest, panels, save, training_curves, violins
from nuguide.experiments.run import Plan, budgeted, divide, folds_of, open_sets, run
from nuguide.experiments.specs import EXPERIMENTS, PAPER, Arm, experiment
from nuguide.experiments.tables import curves, differences, latex, markdown, results, summary
from nuguide.guides import GUIDES, load_guide
from nuguide.metrics import Scores, score
from nuguide.start import model_spec
from nuguide.types import Sample, UserError

ARMS = [pytest.param(e, arm, id=f"{e.name}-{arm.name}") for e in EXPERIMENTS.values() for arm in e.arms]
TINY = dataclasses.replace(PAPER, width=2, batch=2, patch_px=32, epochs=2, steps_per_epoch=1, precision="fp32")
PLAN = Plan(TINY, "efficientnet_lite0", folds=3, arms=["eunet3plus", "cross"])


def drawn(count: int = 6, organs: int = 3, name: str = "cryonuseg") -> Dataset:
    """Drawn tissue at 0.5 microns per pixel, of organs by turns."""

    def entry(seed: int) -> Entry:
        image, labels = draw_tissue(seed, (64, 64), 5, (6, 8))
        sample = Sample(f"image{seed}", image, labels, 0.5, f"organ{seed % organs}")
        return Entry(sample.id, sample.group, lambda: sample)

    return Dataset(name, [entry(seed) for seed in range(count)], "CC0")


# --- arms ---


@pytest.mark.parametrize(("table", "arm"), ARMS)
def test_every_arm_of_every_table_builds(table, arm: Arm) -> None:
    options = arm.recipe(dataclasses.replace(PAPER, width=2), "sam_vit_b")
    channels = None if options.fusion == "none" else GUIDES[str(options.guide)].channels
    spec = dataclasses.replace(
        model_spec(dataclasses.replace(options, fusion="none"), None, [], []),
        fusion=None if channels is None else options.fusion, fusion_options=options.fusion_options,
        levels=options.levels,
    )
    model = checkpoint.build(spec, channels)
    assert sum(p.numel() for p in model.parameters()) > 0
    gates = sum(name.startswith("gates.") for name, _ in model.named_parameters())
    assert bool(gates) == (arm.name == "x_gfb_all")
    assert arm.guided == (options.fusion != "none")


def test_arms_that_tables_share_are_the_same_and_names_are_folders() -> None:
    by_name: dict[str, Arm] = {}
    for table in EXPERIMENTS.values():
        assert len({arm.name for arm in table.arms}) == len(table.arms)
        assert table.reference in {arm.name for arm in table.arms}
        assert set(table.printed) <= {arm.name for arm in table.arms}
        for arm in table.arms:
            assert by_name.setdefault(arm.name, arm) == arm
            assert arm.name.isidentifier()


def test_the_counted_operations_are_those_of_every_arm() -> None:
    counted = json.loads((Path(__file__).resolve().parents[1] / "results" / "operations.json").read_text())
    listed = {name: sorted(arms) for name, arms in counted["experiments"].items()}
    assert listed == {name: sorted(arm.name for arm in chosen.arms) for name, chosen in EXPERIMENTS.items()}


def test_a_recipe_changes_only_what_its_arm_says() -> None:
    base = dataclasses.replace(PAPER, network_options={"dropout": 0.1})
    matched = experiment("table2").arm("glu_matched").recipe(base, "sam_vit_b")
    assert matched.network_options == {"dropout": 0.1, "activation": "glu", "match_width": True}
    assert (matched.network, matched.fusion, matched.lr) == ("eunet3plus", "none", 1e-4)
    control = experiment("table3").arm("cross_random").recipe(base, "efficientnet_lite0")
    assert (control.fusion, control.guide, control.guide_weights) == ("cross", "efficientnet_lite0", "random:0")
    assert experiment("table4").arm("x_gfb_sam_vit_l").recipe(base, "efficientnet_lite0").guide == "sam_vit_l"


def test_what_there_is_not_is_refused_with_the_choices() -> None:
    with pytest.raises(UserError, match="no experiment table9; choose from table1, table2, table3, table4"):
        experiment("table9")
    with pytest.raises(UserError, match="table2 has no arm tanh; choose from relu, leaky_relu, silu"):
        experiment("table2").arm("tanh")


# --- folds and budgets ---


def test_each_image_is_tested_once_and_no_organ_stands_in_two_parts() -> None:
    groups = [f"organ{i % 7}" for i in range(35)]
    folds = folds_of(groups, 5, seed=3)
    assert sorted(i for fold in folds for i in fold.test) == list(range(35))
    for fold in folds:
        parts = [{groups[i] for i in part} for part in (fold.train, fold.val, fold.test)]
        assert all(parts)
        assert sum(len(part) for part in parts) == len(set.union(*parts)) == 7
        assert sorted(fold.train + fold.val + fold.test) == list(range(35))


def test_conic_on_its_own_split_is_one_fold_that_tests_a_fifth_of_the_sources() -> None:
    pytest.importorskip("sklearn")
    groups = [f"{cohort}_{number}" for cohort in ("consep", "dpath") for number in range(10) for _ in range(3)]
    plan = dataclasses.replace(PLAN, split="own")
    (fold,) = divide("conic", groups, plan)
    parts = [{groups[i] for i in part} for part in (fold.train, fold.val, fold.test)]
    assert [len(part) for part in parts] == [13, 3, 4]
    assert len(set.union(*parts)) == 20
    assert {groups[i].split("_")[0] for i in fold.test} == {"consep", "dpath"}
    assert len(divide("conic", groups, PLAN)) == 3
    with pytest.raises(UserError, match="nuinsseg has no split of its own; only conic has"):
        divide("nuinsseg", groups, plan)


@pytest.mark.parametrize(
    ("budget", "epochs", "steps"), [(1.0, 50, 10), (0.5, 25, 10), (0.001, 1, 1), (0.01, 1, 5), (2.0, 50, 20)]
)
def test_a_budget_scales_the_steps(budget: float, epochs: int, steps: int) -> None:
    found = budgeted(dataclasses.replace(PAPER, batch=4), 40, budget)       # 50 epochs of 10 steps
    assert (found.epochs, found.steps_per_epoch) == (epochs, steps)


def test_the_same_steps_in_fewer_epochs() -> None:
    found = budgeted(dataclasses.replace(PAPER, batch=4), 40, 1.0, 10)
    assert (found.epochs, found.steps_per_epoch) == (10, 50)


def test_sets_that_are_missing_are_named(tmp_path: Path) -> None:
    (tmp_path / "cryonuseg").mkdir()
    with pytest.raises(UserError, match=r"holds no folder nuinsseg, conic; .*nuguide data check"):
        open_sets(tmp_path, ["cryonuseg", "nuinsseg", "conic"])


# --- runs ---


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms of table 3 on all three folds of drawn tissue."""
    out = tmp_path_factory.mktemp("experiments")
    run(experiment("table3"), {"cryonuseg": drawn()}, out, PLAN, progress=False)
    return out


def test_a_result_tells_how_it_was_made_and_scores_the_test_images_alone(ran: Path) -> None:
    tested = []
    for number in range(3):
        manifest = read_manifest(ran / "cryonuseg" / f"fold{number}" / "split.json")
        document = json.loads((ran / "cryonuseg" / f"fold{number}" / "cross.json").read_text())
        ids = [row["id"] for row in document["images"]]
        assert ids == [member.id for member in manifest.parts["test"]]
        tested += ids
        facts = document["facts"]
        assert (facts["arm"], facts["fold"], facts["seed"]) == ("cross", number, 0)
        assert facts["split_sha256"] == manifest.sha256
        assert facts["options"]["fusion"] == "cross"
        assert [point["step"] for point in facts["curve"]] == [1, 2]
        assert all(0 <= point["val_dice"] <= 1 and point["train_loss"] > 0 for point in facts["curve"])
        assert {field.name for field in dataclasses.fields(Scores)} <= set(document["images"][0])
        used = json.loads((ran / "cryonuseg" / f"fold{number}" / "cross" / "model" / "config.json").read_text())
        seen = [g for part in ("trained_on", "validated_on") for d in used["origin"][part] for g in d["groups"]]
        assert not {member.group for member in manifest.parts["test"]} & set(seen)
    assert sorted(tested) == [f"image{i}" for i in range(6)]


def test_a_second_call_runs_only_what_is_missing(ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Path] = []

    def fit(train, val, out: Path, options, progress: bool, workers: None) -> Path:
        trained.append(out)
        return ran / "cryonuseg" / "fold1" / "cross" / "model"

    monkeypatch.setattr(runner, "fit", fit)
    place = ran / "cryonuseg" / "fold1" / "cross.json"
    before = place.read_bytes()
    place.unlink()

    def again(plan: Plan = PLAN, images: int = 6) -> list[Path]:
        return run(experiment("table3"), {"cryonuseg": drawn(images)}, ran, plan, progress=False)

    files = again()
    assert trained == [ran / "cryonuseg" / "fold1" / "cross"]
    assert len(files) == 6
    assert json.loads(place.read_text())["images"] == json.loads(before)["images"]
    place.write_bytes(before)
    with pytest.raises(UserError, match="was made with other options or images; choose another --out"):
        again(dataclasses.replace(PLAN, base=dataclasses.replace(TINY, lr=1.0)))
    with pytest.raises(UserError, match=r"split\.json: divides other images, or otherwise"):
        again(images=9)
    seen = json.loads((ran / "cryonuseg" / "fold0" / "split.json").read_text())["parts"]["test"][0]["id"]
    flipped = drawn()
    index = flipped.ids.index(seen)
    sample = flipped[index]
    turned = dataclasses.replace(sample, image_rgb=sample.image_rgb[::-1])
    other = [dataclasses.replace(e, load=lambda: turned) if e.id == seen else e for e in flipped.entries]
    with pytest.raises(UserError, match=r"split\.json: divides other images, or otherwise"):      # of the same names
        run(experiment("table3"), {"cryonuseg": Dataset("cryonuseg", other, "CC0")}, ran, PLAN, progress=False)
    place.write_text("{}")
    with pytest.raises(UserError, match=r"cross\.json: is no result of a run"):
        again()
    with pytest.raises(UserError, match=r"cross\.json: is no result of a run"):
        results(ran, experiment("table3"))
    place.write_bytes(before)
    with pytest.raises(UserError, match=r"cryonuseg: 3 groups cannot be divided into 4 folds.*--folds"):
        again(dataclasses.replace(PLAN, folds=4))


def test_missing_guides_are_told_of_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUGUIDE_CACHE", str(tmp_path / "cache"))
    plan = dataclasses.replace(PLAN, guide="medsam", arms=["eunet3plus", "cross", "cross_random"])
    with pytest.raises(UserError, match=r"the weights of medsam are not here.*--arms"):
        run(experiment("table3"), {"cryonuseg": drawn()}, tmp_path / "out", plan, progress=False)
    both = dataclasses.replace(PLAN, arms=["x_gfb_medsam", "x_gfb_dinov2_small", "x_gfb_efficientnet_lite0"])
    with pytest.raises(UserError, match=r"weights of dinov2_small are not here.*weights of medsam are not here"):
        run(experiment("table4"), {"cryonuseg": drawn()}, tmp_path / "out", both, progress=False)
    mistyped = dataclasses.replace(PLAN, guide="sam_vitb", arms=["x_gfb"])
    with pytest.raises(UserError, match="unknown guide 'sam_vitb'; choose from efficientnet_lite0, "):
        run(experiment("table1"), {"cryonuseg": drawn()}, tmp_path / "out", mistyped)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"budget": -1.0}, "--budget must be positive, not -1.0"),
        ({"epochs": 0}, "--epochs must be 1 or more, not 0"),
        ({"folds": 1}, "--folds must be 2 or more, not 1"),
        ({"only_folds": [9]}, "--only-folds 9: there are the folds 0 to 2"),
        ({"only_folds": [1], "split": "own"}, "--only-folds 1: there are the folds 0 to 0"),
    ],
)
def test_plans_that_cannot_be_are_refused(change: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        dataclasses.replace(PLAN, **change)


def test_the_command_prints_tables_and_draws_figures(ran: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["tables", "table3", "--out", str(ran), "--to", str(tmp_path / "tables")])
    assert not ended.value.code
    said = capsys.readouterr().out
    assert "## Fusion of the guide" in said
    assert "Minus eU-Net3+, image by image:" in said
    assert (tmp_path / "tables" / "table3.tex").read_text().count(r"\\") == 2 + len(experiment("table3").arms)
    with pytest.raises(SystemExit) as ended:
        main(["figures", "--out", str(ran), "--to", str(tmp_path / "figures")])
    assert not ended.value.code
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        f"{table}.{kind}.png" for table, kinds in (
            ("table1", ("bars", "violins", "curves")), ("table2", ("bars", "violins", "curves")),
            ("table3", ("bars", "violins", "curves")),
        ) for kind in kinds
    } | {"table3.differences.png"}
    with pytest.raises(SystemExit) as ended:
        main(["tables", "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert "holds no results; make some with nuguide-experiments run" in capsys.readouterr().err


# --- tables by hand ---


def made(out: Path, arm: str, fold: int, dice: dict[str, float]) -> None:
    """A result file whose metrics are all the same; of each image the first letter names its organ."""
    place = out / "cryonuseg" / f"fold{fold}"
    place.mkdir(parents=True, exist_ok=True)
    names = [field.name for field in dataclasses.fields(Scores)]
    same = {"dataset": "cryonuseg"}
    rows = [{**same, "id": id, "group": id[0], **dict.fromkeys(names, value)} for id, value in dice.items()]
    (place / f"{arm}.json").write_text(json.dumps({"facts": {"arm": arm, "fold": fold, "seed": 0}, "images": rows}))


def test_means_are_over_images_and_spreads_over_folds(tmp_path: Path) -> None:
    made(tmp_path, "relu", 0, {"a": 0.5, "b": 0.7})
    made(tmp_path, "relu", 1, {"c": 0.9})
    made(tmp_path, "silu", 0, {"a": 0.4, "b": 0.8})
    rows = results(tmp_path, experiment("table2"))
    table = summary(rows, experiment("table2")).set_index("arm")
    assert table.loc["relu", "dice"] == pytest.approx(0.7)
    assert table.loc["relu", "dice_sd"] == pytest.approx(np.std([0.6, 0.9], ddof=1))
    assert np.isnan(table.loc["silu", "dice_sd"])
    assert table.loc["relu", "printed_dice"] == 0.778
    assert np.isnan(table.loc["relu", "printed_iou"])
    apart = differences(rows, experiment("table2")).set_index(["arm", "metric"])
    assert apart.loc[("silu", "dice"), "difference"] == pytest.approx(0.0)          # -0.1 and +0.1, of a and b alone
    assert apart.loc[("silu", "dice"), "n"] == 2
    text = markdown(rows, experiment("table2"))
    assert "| ReLU | 3 | 2 | 0.700 ± 0.212 |" in text
    assert "| Swish | 2 | 1 | 0.600 |" in text
    assert "| Swish | +0.000 (-0.100 to +0.100) |" in text
    same = r"0.700 $\pm$ 0.212"
    assert rf"ReLU & {same} & {same} & {same} & {same} & 0.778 \\" in latex(rows, experiment("table2"))
    assert r"LeakyReLU & -- & -- & -- & -- & 0.793 \\" in latex(rows, experiment("table2"))
    assert r"{dsb\_he}" in latex(rows.assign(set="dsb_he"), experiment("table2"))      # _ alone would not compile


def test_intervals_of_differences_are_of_whole_organs(tmp_path: Path) -> None:
    """Organ a gains 0.1, organ b loses 0.1, both in ten images: one draw in four is of a alone, one of b alone."""
    made(tmp_path, "relu", 0, {f"{organ}{i}": 0.5 for organ in "ab" for i in range(10)})
    made(tmp_path, "silu", 0, {f"{organ}{i}": 0.6 if organ == "a" else 0.4 for organ in "ab" for i in range(10)})
    apart = differences(results(tmp_path, experiment("table2")), experiment("table2")).set_index("metric")
    assert apart.loc["dice", ["difference", "low", "high"]].tolist() == pytest.approx([0, -0.1, 0.1])


def test_people_and_the_classical_method_stand_beside_the_arms_on_the_images_that_were_tested(tmp_path: Path) -> None:
    made(tmp_path / "runs", "relu", 0, {"a": 0.5, "b": 0.7})
    made(tmp_path / "runs", "annotator2", 0, {"a": 0.8, "b": 0.6, "of another fold": 0.1})
    beside = tmp_path / "beside"
    beside.mkdir()
    (tmp_path / "runs/cryonuseg/fold0/annotator2.json").rename(beside / "annotator2.cryonuseg.json")
    chosen = experiment("table2")
    text = markdown(results(tmp_path / "runs", chosen), chosen, beside)
    assert "| second annotator | 2 |  | 0.700 | 0.700 | 0.700 | 0.700 | 0.700 | 0.700 |  |  |" in text
    assert "classical" not in text                                                  # was not scored
    line = r"second annotator & 0.700 & 0.700 & 0.700 & 0.700 & -- \\"
    assert line in latex(results(tmp_path / "runs", chosen), chosen, beside)
    assert "annotator" not in markdown(results(tmp_path / "runs", chosen), chosen)


def test_a_set_where_an_arm_was_run_for_another_table_is_left_out(tmp_path: Path) -> None:
    made(tmp_path, "eunet3plus", 0, {"a": 0.5})
    (tmp_path / "cryonuseg").rename(tmp_path / "nuinsseg")
    assert results(tmp_path, experiment("table2"))["set"].tolist() == ["nuinsseg"]      # nothing else was run
    made(tmp_path, "eunet3plus", 0, {"a": 0.5})
    made(tmp_path, "relu", 0, {"a": 0.6})
    assert set(results(tmp_path, experiment("table2"))["set"]) == {"cryonuseg"}
    assert set(results(tmp_path, experiment("table1"))["set"]) == {"cryonuseg", "nuinsseg"}
    made(tmp_path, "relu", 1, {"b": 0.6})
    assert len(results(tmp_path, experiment("table2"))) == 3  # each fold of an arm that has it


def test_no_results_make_empty_tables(tmp_path: Path) -> None:
    rows = results(tmp_path, experiment("table1"))
    assert rows.empty
    assert markdown(rows, experiment("table1")) == ""
    assert differences(rows, experiment("table1")).empty


# --- figures ---


def test_figures_show_every_arm(tmp_path: Path) -> None:
    for fold in (0, 1):
        for arm, shift in (("relu", 0.0), ("silu", 0.1), ("eunet3plus", 0.2)):
            made(tmp_path, arm, fold, {f"{fold}{i}": 0.5 + shift + 0.01 * i for i in range(4)})
    rows, table = results(tmp_path, experiment("table2")), experiment("table2")
    drawn_bars = bars(rows, table).axes[0]
    heights = [patch.get_bbox().height for patch in drawn_bars.patches]  # pyright: ignore
    assert heights == pytest.approx([0.515, 0.615, 0.715])
    assert [t.get_text() for t in violins(rows, table).axes[0].get_xticklabels()] == ["ReLU", "Swish", "eU-Net3+"]
    for axes in forest(rows, table).axes:
        assert axes.lines[0].get_xdata() == pytest.approx([0.1, 0.2])
    assert save(bars(rows, table), tmp_path / "new" / "bars.png").stat().st_size > 1000


def test_the_components_of_a_latent_of_one_direction_are_that_direction() -> None:
    guide = load_guide("efficientnet_lite0")
    image = draw_tissue(0, (96, 128), 8, (6, 9))[0]
    picture = components(guide, image)
    assert picture.shape == (96, 128, 3)
    assert picture.dtype == np.uint8
    assert [(picture[..., c].min(), picture[..., c].max()) for c in range(3)] == [(0, 255)] * 3
    figure = encodings({"one": guide, "two": guide}, {"drawn": image})
    assert len(figure.axes) == 3


def test_curves_are_means_over_folds(tmp_path: Path) -> None:
    for fold, loss in ((0, 0.5), (1, 0.7)):
        made(tmp_path, "relu", fold, {f"{fold}": 0.5})
        file = tmp_path / "cryonuseg" / f"fold{fold}" / "relu.json"
        document = json.loads(file.read_text())
        document["facts"]["curve"] = [{"step": 10, "train_loss": loss, "val_dice": 0.6}]
        file.write_text(json.dumps(document))
    table = curves(tmp_path, experiment("table2"))
    assert table["fold"].tolist() == [0, 1]
    loss, dice = training_curves(table, experiment("table2")).axes
    assert [np.asarray(line.get_xydata()).tolist() for line in loss.lines] == [[[10, pytest.approx(0.6)]]]
    assert [np.asarray(line.get_ydata()).tolist() for line in dice.lines] == [[0.6]]


def test_an_arm_has_one_color_in_all_panels_and_its_control_is_dashed() -> None:
    """Cross-attention was run on both sets, concatenation on one: colors must not depend on what else was run."""
    runs = [("cryonuseg", "cross"), ("nuinsseg", "concat"), ("nuinsseg", "cross"), ("nuinsseg", "cross_random")]
    rows = [(name, arm, 0, step, 0.5, 0.5) for name, arm in runs for step in (10, 20)]
    table = pd.DataFrame(rows, columns=pd.Index(["set", "arm", "fold", "step", "train_loss", "val_dice"]))
    figure = training_curves(table, experiment("table3"))
    looks = [{line.get_label(): (line.get_color(), line.get_linestyle()) for line in one.lines} for one in figure.axes]
    cross, control = "guided, cross-attention (ours)", "guided, cross-attention, guide of random weights"
    assert len({look[cross] for look in looks}) == 1
    assert looks[2][control] == (looks[2][cross][0], "--") != looks[2][cross]
    assert looks[2]["guided, concatenated"][0] != looks[2][cross][0]
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == set(looks[2])


def test_curves_of_folds_of_unequal_length_are_averaged_by_epoch() -> None:
    rows = [("nuinsseg", "relu", fold, step, loss, 0.5) for fold, step, loss in
            ((0, 50, 0.8), (0, 100, 0.4), (1, 52, 0.6), (1, 104, 0.2))]
    table = pd.DataFrame(rows, columns=pd.Index(["set", "arm", "fold", "step", "train_loss", "val_dice"]))
    (line,) = training_curves(table, experiment("table2")).axes[0].get_lines()
    np.testing.assert_allclose(np.asarray(line.get_xydata()), [[51, 0.7], [102, 0.3]])


def test_panels_have_a_column_for_every_model() -> None:
    image, labels = draw_tissue(0, (64, 64), 5, (6, 8))
    figure = panels([("one", image, labels, {"a": labels, "b": 0 * labels}), ("two", image, labels, {"a": labels})])
    assert len(figure.axes) == 8
    shown = np.asarray(figure.axes[2].images[0].get_array())
    assert (shown == (0, 230, 64)).all(-1).sum() > 50                                   # outlines were drawn
    assert np.array_equal(np.asarray(figure.axes[3].images[0].get_array()), image)      # of nothing, none


# --- what stands beside ---


def test_people_are_scored_image_by_image_whatever_their_order() -> None:
    truth = drawn(4)
    same = people(truth, truth.subset([3, 1, 0, 2]))
    assert same["dice"].tolist() == [1.0] * 4
    assert same["id"].tolist() == truth.ids


def test_the_classical_method_finds_dark_disks_and_nothing_on_glass() -> None:
    image, labels = draw_tissue(3, (128, 128), 12, (7, 9))
    found = otsu_watershed(image, 0.5)
    assert score(labels, found).dice > 0.75
    assert found.max() >= 6
    assert otsu_watershed(np.full((40, 40, 3), 245, np.uint8), 0.5).max() == 0
    table = classical(drawn(2))
    assert isinstance(table, pd.DataFrame)
    assert len(table) == 2


def test_the_second_annotator_and_the_classical_method_are_scored_by_command(tmp_path: Path, capsys) -> None:
    place = tmp_path / "data" / "cryonuseg"
    for part in ("images", "labels", "labels_annot2", "labels_annot1_round2"):
        (place / part).mkdir(parents=True)
    rows = ["id,group"]
    for seed in range(2):
        image, labels = draw_tissue(seed, (64, 64), 5, (6, 8))
        Image.fromarray(image).save(place / "images" / f"{seed}.png")
        for part, found in (("labels", labels), ("labels_annot2", 0 * labels), ("labels_annot1_round2", labels)):
            Image.fromarray(found.astype(np.uint16)).save(place / part / f"{seed}.png")
        rows.append(f"{seed},organ{seed}")
    (place / "manifest.csv").write_text("\n".join(rows) + "\n")
    with pytest.raises(SystemExit) as ended:
        main(["beside", "--data-root", str(tmp_path / "data"), "--out", str(tmp_path / "out")])
    assert not ended.value.code
    dice = {file.name.split(".")[0]: read_scores(file)["dice"].tolist() for file in (tmp_path / "out").iterdir()}
    assert dice["annotator2"] == [0.0, 0.0]
    assert dice["annotator1_round2"] == [1.0, 1.0]
    assert min(dice["classical"]) > 0.6
    assert "cryonuseg, 2 images, annotator2:" in capsys.readouterr().out
