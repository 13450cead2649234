import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from datasets.transforms import fine_tuning_augmentation
from downstream import finetuning
from downstream.classification.finetune import ClassificationConfig
from downstream.features import calibrate_batch_norm
from engine.run_folder import RunFolder
from engine.task import Run
from models import build_encoder
from models.task_heads import Classification
from utils.errors import CheckpointError, UserError

pytestmark = pytest.mark.usefixtures("small_runs")
CPU = torch.device("cpu")


class Balls(Dataset):
    """Clouds of two sizes."""

    def __init__(self, count=6):
        generator = torch.Generator().manual_seed(0)
        self.points = torch.randn(count, 16, 3, generator=generator) * (1 + torch.arange(count) % 2)[:, None, None]

    def __len__(self):
        return len(self.points)

    def __getitem__(self, index):
        return self.points[index], index % 2


def parse(tmp_path, *arguments):
    parser = ClassificationConfig.parser(None)
    parser.set_defaults(exp_name="a")
    common = ["--output_dir", tmp_path, "--device", "cpu", "--workers", 0, "--batch_size", 2, "--epochs", 2]
    common += ["--emb_dims", 8, "--k", 4]
    return ClassificationConfig.from_flags(parser.parse_args([str(a) for a in (*common, *arguments)]))


def tuning(tmp_path, *arguments, name="a", **changes):
    args = parse(tmp_path, *arguments)
    model, _ = finetuning.start_model(args, Classification, sizes={"num_classes": 2})
    settings = {
        "model": model,
        "dataset": Balls(),
        "chosen": np.arange(6),
        "validate": None,
        "score": "accuracy",
        "table": {"class_names": ["small", "large"]},
        "identity": "balls",
        "augmentation": fine_tuning_augmentation(),
    }
    folder = RunFolder(tmp_path / name, overwrite=args.overwrite, resume=args.resume)
    return Run(finetuning.FineTuning(args, **{**settings, **changes}), folder)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 4)])
def test_label_smoothing_is_the_released_formula(shape):
    scores, target = torch.randn(shape, dtype=torch.float64), torch.randint(7, (5, *shape[2:]))
    share = torch.full(shape, 0.2 / 6, dtype=torch.float64).scatter(1, target[:, None], 0.8)
    expected = -(share * F.log_softmax(scores, 1)).sum(1).mean()
    assert finetuning.smoothed_cross_entropy(scores, target).item() == pytest.approx(expected.item(), rel=1e-6)
    assert finetuning.smoothed_cross_entropy(torch.randn(3, 1), torch.zeros(3, dtype=torch.int64)).item() == 0
    with pytest.raises(UserError, match="--label_smoothing 0.9 with 7 classes: expected at most 1 - 1/7"):
        finetuning.smoothed_cross_entropy(scores, target, 0.9)


def test_points_without_a_label_are_ignored_and_every_sample_counts_alike():
    scores, target = torch.randn(3, 5, 8, dtype=torch.float64), torch.randint(5, (3, 8))
    target[0, 1:], target[1, :5] = finetuning.IGNORED, finetuning.IGNORED
    expected = 0.0
    for sample, labels in zip(scores, target, strict=True):
        known = [n for n in range(8) if labels[n] >= 0]
        for n in known:
            share = torch.full((5,), 0.2 / 4, dtype=torch.float64)
            share[labels[n]] = 0.8
            expected -= (share * F.log_softmax(sample[:, n], 0)).sum() / len(known) / 3
    assert finetuning.cross_entropy_of_labeled(scores, target).item() == pytest.approx(expected.item(), rel=1e-6)
    full = torch.randint(5, (3, 8))
    whole, mean = finetuning.cross_entropy_of_labeled(scores, full), finetuning.smoothed_cross_entropy(scores, full)
    assert whole.item() == pytest.approx(mean.item(), rel=1e-6)


def test_labeled_points_are_one_of_every_label_then_random_ones_up_to_the_share():
    labels = np.repeat([2, 5, 9], [30, 9, 1])
    for fraction in (0.01, 0.1, 0.5, 1):
        for index in range(4):
            order = np.random.default_rng([7, index]).permutation(40).tolist()
            chosen = {next(n for n in order if labels[n] == label) for label in (2, 5, 9)}
            for n in order:
                if len(chosen) < round(fraction * 40):
                    chosen.add(n)
            known = finetuning.labeled_points(labels, fraction, seed=7, index=index)
            assert set(np.flatnonzero(known)) == chosen
    first, second = (finetuning.labeled_points(labels, 0.1, seed=7, index=i) for i in (0, 1))
    assert (first != second).any()


def rates(scheduler, *, epochs=40, steps=5, base=0.1, lr=1e-3, **more):
    total = range(epochs * steps)
    settings = {"scheduler": scheduler, "epochs": epochs, "steps_per_epoch": steps, "base": base, "lr": lr, **more}
    return [finetuning.fine_tuning_rate(step, **settings) for step in total]


def test_cosine_really_decays_with_adam_too():
    for base in (0.1, 1e-3):
        found = rates("cosine", base=base)
        assert found[0] == base and found == sorted(found, reverse=True) and found[-1] < 0.011 * base
        assert found[100] == pytest.approx((base + base / 100) / 2)


def test_step_halves_every_twenty_epochs_and_has_a_floor():
    found = rates("step")
    assert found[:100] == [0.1] * 100 and found[100:] == [0.05] * 100
    assert min(rates("step", epochs=2000, steps=1, base=1e-3)) == 1e-5


def test_released_is_constant_with_adam_and_swings_with_classification():
    assert rates("released", base=1e-3) == [1e-3] * 200
    found = rates("released")
    assert found[:5] == [0.1] * 5 and found[5] < 0.1 and found[195] > 1e-3
    for base in (0.1, 1e-3):  # SGD, Adam
        swinging = rates("released", base=base, per_batch=True)
        assert swinging[0] == pytest.approx(swinging[80]) == pytest.approx(base)
        assert min(swinging) == swinging[40] == pytest.approx(base / 100)


def test_labeled_samples_hold_every_class_and_the_asked_share():
    labels = np.repeat([0, 3, 7], [100, 50, 2])
    for fraction, count in ((0.01, 3), (0.1, 15), (0.5, 76), (1, 152)):
        chosen = finetuning.choose_labeled(labels, fraction, seed=1)
        assert len(chosen) == count == len(set(chosen)) and set(labels[chosen]) == {0, 3, 7}
    assert not np.array_equal(*(finetuning.choose_labeled(labels, 0.1, seed=s) for s in (1, 2)))
    for wrong in (0, -0.1, 1.1):
        with pytest.raises(UserError, match="--label_fraction"):
            finetuning.choose_labeled(labels, wrong, seed=1)


def test_holding_out_never_takes_the_last_of_a_class():
    labels = np.repeat([0, 1, 2], [8, 1, 1])
    fit, held = finetuning.hold_out(labels, 0.5, seed=3)
    assert len(held) == 5 and set(labels[held]) == {0} and sorted([*fit, *held]) == list(range(10))
    assert len(finetuning.hold_out(np.arange(4), 0.5, seed=3)[1]) == 0


def test_scores_are_averaged_over_copies_and_the_mode_comes_back():
    model = nn.Module()
    model.scores = lambda x: torch.stack([x.sum((1, 2)), -x.sum((1, 2))], 1)
    model.train()
    dataset = Balls()
    plain = torch.cat([s for s, _ in finetuning.scores_of(model, dataset, batch_size=4, device=CPU)])
    assert plain.shape == (6, 2) and model.training
    numbers = []

    def flip(points, number):
        numbers.extend(number.tolist())
        return -points

    both = torch.cat([s for s, _ in finetuning.scores_of(model, dataset, batch_size=4, device=CPU, copies=[flip])])
    torch.testing.assert_close(both, torch.full((6, 2), 0.5))
    assert numbers == list(range(6))
    some = torch.cat([s for s, _ in finetuning.scores_of(model, dataset, batch_size=4, device=CPU, chosen=[5, 0])])
    torch.testing.assert_close(some, plain[[5, 0]])


def test_the_best_epoch_is_kept_beside_the_last(tmp_path):
    scores = iter([50.0, 70.0, 60.0])
    run = tuning(tmp_path, "--epochs", 3, validate=lambda model: {"accuracy": next(scores), "ignored": {}})
    tested = []
    result = finetuning.fine_tune(
        run, lambda model: tested.append(model.head.linear3.weight.clone()) or {"accuracy": 1.0}, []
    )
    assert (result["best"]["epoch"], result["best"]["val_accuracy"]) == (2, 70.0)
    assert (result["last"]["epoch"], result["last"]["val_accuracy"]) == (3, 60.0)
    assert finetuning.reported_entry(result) == ("best on val", result["best"])
    assert not torch.equal(*tested)  # the two were tested with their own weights
    best = torch.load(tmp_path / "a/best.pth", weights_only=True)
    assert torch.equal(best["head"]["linear3.weight"], tested[1]) and best["table"]["class_names"] == ["small", "large"]


@pytest.mark.parametrize(
    "arguments", [(), ("--use_sgd", "--amp", "bf16", "--scheduler", "step"), ("--freeze_encoder", "--calibrate_bn")]
)
def test_resuming_within_an_epoch_is_exact(tmp_path, arguments, caplog):
    few = (*arguments, "--epochs", 2, "--save_every", 1)
    whole = tuning(tmp_path, *few, name="whole")
    finetuning.fine_tune(whole, lambda model: {}, [])

    def interrupt(step, *flags):
        def stop(batch, progress):
            if progress.step == step:
                raise KeyboardInterrupt

        part = tuning(tmp_path, *few, *flags, name="part")
        part.task.count_bad_samples = stop
        with pytest.raises(KeyboardInterrupt):
            finetuning.fine_tune(part, lambda model: {}, [])

    interrupt(0)
    assert "interrupted" not in caplog.text  # nothing to continue from
    interrupt(4)
    message = f"interrupted at step 4; continue from the newest checkpoint in {tmp_path / 'part'} with --resume"
    assert message in caplog.text and message in (tmp_path / "part" / "run.log").read_text()
    caplog.clear()
    interrupt(0, "--overwrite")
    assert "interrupted" not in caplog.text  # the checkpoint belongs to the earlier run, which is put back
    again = tuning(tmp_path, *few, "--resume", name="part")
    finetuning.fine_tune(again, lambda model: {}, [])
    assert again.progress.step == whole.progress.step == 6
    for key, value in whole.task.model.state_dict().items():
        assert torch.equal(value, again.task.model.state_dict()[key]), key


@pytest.mark.parametrize("arguments", [(), ("--head", "linear", "--use_sgd")])
def test_a_frozen_encoder_stays_bit_for_bit_while_the_head_trains(tmp_path, arguments):
    run = tuning(tmp_path, "--freeze_encoder", *arguments)
    before = {key: value.clone() for key, value in run.task.model.state_dict().items()}
    trained = {id(parameter) for group in run.optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in run.task.model.head.parameters()}
    finetuning.fine_tune(run, lambda model: {}, [])
    for key, value in run.task.model.state_dict().items():
        assert torch.equal(value, before[key]) == key.startswith("encoder."), key


def test_statistics_of_an_untrained_encoder_are_set_from_the_samples_alone(tmp_path):
    run = tuning(tmp_path, "--freeze_encoder", "--calibrate_bn", "--test_batch_size", 2)
    encoder = run.task.model.encoder
    weights = {name: parameter.clone() for name, parameter in encoder.named_parameters()}
    finetuning.fine_tune(run, lambda model: {}, [])
    assert all(torch.equal(parameter, weights[name]) for name, parameter in encoder.named_parameters())
    expected = build_encoder("dgcnn_cls", k=4, emb_dims=8)
    expected.load_state_dict(encoder.state_dict())
    rows = np.random.default_rng(1).permutation(6)
    calibrate_batch_norm(expected, Balls().points[rows].numpy(), batch_size=2, progress=False)
    assert all(torch.equal(value, encoder.state_dict()[key]) for key, value in expected.state_dict().items())
    assert encoder.conv1[1].num_batches_tracked == 3
    assert "statistics are those of 6 samples" in (tmp_path / "a/run.log").read_text()


def test_a_finished_run_is_extended_exactly_where_its_rate_does_not_follow_from_the_epochs(tmp_path, caplog):
    steps = ("--use_sgd", "--scheduler", "step", "--epochs")
    whole = tuning(tmp_path, *steps, 3, name="whole")
    finetuning.fine_tune(whole, lambda model: {}, [])
    finetuning.fine_tune(tuning(tmp_path, *steps, 2, name="part"), lambda model: {}, [])
    finetuning.fine_tune(tuning(tmp_path, *steps, 2, "--resume", name="part"), lambda model: {}, [])
    assert "all 2 epochs are done; a higher --epochs continues the run" in caplog.text  # as the next call does
    more = tuning(tmp_path, *steps, 3, "--resume", name="part")
    finetuning.fine_tune(more, lambda model: {}, [])
    assert more.progress.epoch == whole.progress.epoch == 3
    for key, value in whole.task.model.state_dict().items():
        assert torch.equal(value, more.task.model.state_dict()[key]), key
    with pytest.raises(CheckpointError, match="--epochs 3 there, 2 here"):  # not the other way round
        finetuning.fine_tune(tuning(tmp_path, *steps, 2, "--resume", name="part"), lambda model: {}, [])
    finetuning.fine_tune(tuning(tmp_path, "--use_sgd", name="cosine"), lambda model: {}, [])
    caplog.clear()
    finetuning.fine_tune(tuning(tmp_path, "--use_sgd", "--resume", name="cosine"), lambda model: {}, [])
    assert "all 2 epochs are done; this run cannot be extended" in caplog.text
    assert "a new run with another --exp_name" in caplog.text
    with pytest.raises(CheckpointError, match="--epochs 2 there, 3 here.*nor extended where .*; a new run"):
        finetuning.fine_tune(tuning(tmp_path, "--use_sgd", "--epochs", 3, "--resume", name="cosine"), lambda m: {}, [])


def test_resuming_with_other_settings_or_data_is_refused(tmp_path):
    finetuning.fine_tune(tuning(tmp_path), lambda model: {}, [])
    with pytest.raises(CheckpointError, match=r"--lr 0\.001 there, 0\.5 here"):
        finetuning.fine_tune(tuning(tmp_path, "--resume", "--lr", 0.5), lambda model: {}, [])
    with pytest.raises(CheckpointError, match="other shapes"):
        finetuning.fine_tune(tuning(tmp_path, "--resume", chosen=np.arange(1, 6)), lambda model: {}, [])


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    dataset = Balls()
    dataset.points[3] = math.nan
    with pytest.raises(UserError, match="the loss is not finite at step"):
        finetuning.fine_tune(tuning(tmp_path, dataset=dataset, augmentation=None), lambda model: {}, [])


def test_one_sample_is_too_few_and_few_are_one_batch(tmp_path):
    with pytest.raises(UserError, match="1 training sample.s.: batch norm needs at least two"):
        tuning(tmp_path, chosen=np.array([2]))
    assert tuning(tmp_path, "--batch_size", 32, name="b").task.total_steps == 2


def test_the_smaller_last_batch_is_kept_below_a_hundred_samples(tmp_path):
    def epoch(count, batch):
        run = tuning(tmp_path, "--batch_size", batch, name=f"{count}", dataset=Balls(count), chosen=np.arange(count))
        sizes = []
        run.task.count_bad_samples = lambda items, _: sizes.append(len(items[0]))
        finetuning.fine_tune(run, lambda model: {}, [])
        assert run.progress.step == len(sizes) == run.task.total_steps
        return sizes

    assert epoch(9, 4) == [4, 3, 2] * 2  # a step of one sample would have no batch statistics
    assert epoch(10, 4) == [4, 4, 2] * 2
    assert epoch(99, 64) == [64, 35] * 2 and epoch(100, 64) == [64] * 2
    assert (
        tuning(tmp_path, "--batch_size", 32, name="c", dataset=Balls(33), chosen=np.arange(33)).task.total_steps
        == 2 * 2
    )


def test_settings_that_contradict_each_other(tmp_path):
    for arguments, message in (
        (("--eval",), "--eval needs --model_path"),
        (("--model_path", "x"), "to start from pretrained weights use --pretrain_path"),
        (("--eval", "--model_path", "x", "--pretrain_path", "y"), "cannot be used with --pretrain_path"),
        (("--batch_size", 1), "--batch_size 1"),
        (("--dropout", 0.5, "--head", "linear"), "--dropout belongs to --head published"),
        (("--json", tmp_path), "cannot write"),
    ):
        with pytest.raises(UserError, match=message):
            finetuning.check_training_arguments(parse(tmp_path, *arguments))


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *[("--lr", value) for value in ("-1", "nan")],
        *[(flag, "-1") for flag in ("--weight_decay", "--momentum", "--eval_every")],
        *[(flag, "1") for flag in ("--label_smoothing", "--dropout", "--holdout")],
    ],
)
def test_values_that_cannot_train_are_refused_by_name(tmp_path, capsys, flag, value):
    with pytest.raises(SystemExit):
        parse(tmp_path, flag, value)
    assert f"argument {flag}: " in capsys.readouterr().err


def test_several_runs_are_looked_at_before_one_is_overwritten_or_started(tmp_path):
    (tmp_path / "a" / "two").mkdir(parents=True)
    (tmp_path / "a" / "two" / "last.pth").write_bytes(b"precious")
    with pytest.raises(UserError, match="two holds an earlier run"):
        finetuning.run_folders(parse(tmp_path), ["one", "two"])
    with pytest.raises(UserError, match="continues one run, but this call has 2"):
        finetuning.run_folders(parse(tmp_path, "--resume", "x.pth"), ["one", "two"])
    assert [f.path.name for f in finetuning.run_folders(parse(tmp_path, "--overwrite"), ["one", "two"])] == [
        "one",
        "two",
    ]
    # Nothing is lost before the run itself begins.
    assert (tmp_path / "a" / "two" / "last.pth").read_bytes() == b"precious"


def test_the_head_starts_the_same_with_and_without_pretraining(tmp_path):
    encoder = build_encoder("dgcnn_cls", k=4, emb_dims=8)
    torch.save(encoder.state_dict(), tmp_path / "p.pth")
    more = ("--pretrain_path", tmp_path / "p.pth", "--model", "dgcnn_cls")
    fresh, _ = finetuning.start_model(parse(tmp_path), Classification, sizes={"num_classes": 2})
    loaded, report = finetuning.start_model(parse(tmp_path, *more), Classification, sizes={"num_classes": 2})
    assert torch.equal(fresh.head.linear1.weight, loaded.head.linear1.weight)
    assert torch.equal(loaded.encoder.conv3[0].weight, encoder.conv3[0].weight)
    assert "loaded from" in report[0] and "starts fresh" in report[1]


@pytest.mark.parametrize(("fraction", "text"), [(1.0, "100%"), (0.05, "5%"), (0.001, "0.1%"), (1 / 3, "33.3%")])
def test_small_shares_of_labels_are_not_shown_as_none(fraction, text):
    assert finetuning.percent(fraction) == text
