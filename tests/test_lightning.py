"""Lightning and Fabric against one pass over the whole batch: gradients, logs, steps, resume."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradaccum
from gradaccum.errors import BadInput, NotDecomposable
from tests import models, oracle

pl = pytest.importorskip("lightning.pytorch")
from lightning.fabric import Fabric  # noqa: E402
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402
from torchmetrics import MeanMetric  # noqa: E402

from gradaccum.integrations.lightning import attach  # noqa: E402
from gradaccum.integrations.lightning_watching import Watching  # noqa: E402
from gradaccum.report.read import read  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
LENGTHS = [3, 30, 4, 17, 5, 2, 26, 9, 11, 3, 22, 6, 8, 2, 14, 31, 7, 12, 19, 5, 28, 10]
BATCH = 8
BUDGET = gradaccum.Budget(tokens=60)


def token_mean(net, batch):
    """The mean over trained tokens, and the share of them that is predicted."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits, labels = net(**inputs)[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    hits = (logits.argmax(-1) == labels)[labels != -100]
    return F.cross_entropy(logits, labels), hits.double().mean(), len(hits)


class Module(pl.LightningModule):
    """What a user writes: nothing of gradaccum in it."""

    def __init__(self, optimizer=torch.optim.SGD, **options):
        super().__init__()
        self.net = models.model()
        self.seen = MeanMetric().set_dtype(torch.float64)
        self.make, self.options = optimizer, {"lr": 0.1} | options
        self.gradients, self.losses, self.calls = [], [], []

    def training_step(self, batch, batch_idx):
        self.calls.append(batch_idx)
        loss, accuracy, num = token_mean(self.net, batch)
        self.log("loss", loss)
        self.log("accuracy", accuracy, on_step=True, on_epoch=True, batch_size=num)
        self.log_dict({"tokens": float(num), "largest": float(num)}, reduce_fx="sum")
        self.seen(accuracy, weight=num)
        self.log("seen", self.seen, on_step=True, on_epoch=True)
        return {"loss": loss}

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", token_mean(self.net, batch)[0])

    def on_before_optimizer_step(self, optimizer):
        left = oracle.left_in(self.net)
        del left["position.weight"]  # no optimizer holds it, so nobody clears it in a stock run
        self.gradients.append({n: None if g is None else g.clone() for n, g in left.items()})

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())

    def configure_optimizers(self):
        trained = [p for n, p in self.net.named_parameters() if n != "position.weight"]
        optimizer = self.make(trained, **self.options)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Keep(pl.loggers.logger.DummyLogger):
    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))


def loader(batch_size=BATCH, collate=models.collated):
    return torch.utils.data.DataLoader(
        models.examples(LENGTHS), batch_size=batch_size, collate_fn=collate
    )


def trainer(tmp_path, **kwargs):
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "precision": "64-true",
        "logger": Keep(),
        "default_root_dir": tmp_path,
    }
    return pl.Trainer(**settings | kwargs)


def fit(tmp_path, module, data=None, val=None, **kwargs):
    made = trainer(tmp_path, **kwargs)
    made.fit(module, data or loader(), val)
    return made


def same(ours, full, tolerance=1e-12):
    assert len(ours.gradients) == len(full.gradients) > 0
    for found, expected in zip(ours.gradients, full.gradients, strict=True):
        assert oracle.error(found, expected) <= tolerance
    found, expected = (dict(m.net.named_parameters()) for m in (ours, full))
    assert oracle.error(found, expected) <= tolerance
    assert ours.losses == pytest.approx(full.losses, rel=tolerance)


def same_logs(ours, full, tolerance=1e-12):
    assert len(ours.rows) == len(full.rows) > 0
    for (step, found), (other, expected) in zip(ours.rows, full.rows, strict=True):
        assert step == other and found.keys() == expected.keys()
        assert found == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("collate", [models.collated, list], ids=["collated", "examples"])
@pytest.mark.parametrize(
    ("weight", "budget"), [("shifted_tokens", BUDGET), (None, BUDGET), (None, "auto")]
)
def test_a_run_is_the_run_of_whole_batches(tmp_path, collate, weight, budget):
    full = Module()
    expected = fit(tmp_path, full, val=loader(), gradient_clip_val=0.5)
    ours = attach(Module(), budget=budget, collate=models.collated, weight=weight)
    found = fit(tmp_path, ours, loader(collate=collate), loader(), gradient_clip_val=0.5)
    assert type(ours).__name__ == "Module" and isinstance(ours, Module)
    assert ours.accumulation.last.num_micros > 1 or budget == "auto"
    assert ours.accumulation.accumulator.found is None or budget == "auto"
    assert ours.accumulation.last.num_examples == len(LENGTHS) % BATCH
    same(ours, full)
    same_logs(found.logger, expected.logger)
    assert found.global_step == expected.global_step == 6
    assert found.optimizers[0].param_groups[0]["lr"] == expected.optimizers[0].param_groups[0]["lr"]


def test_accumulate_grad_batches_is_not_that_run(tmp_path):
    full, stock = Module(), Module()
    fit(tmp_path, full, max_epochs=1)
    fit(tmp_path, stock, loader(2), max_epochs=1, accumulate_grad_batches=BATCH // 2)
    errors = [
        oracle.error(found, expected)
        for found, expected in zip(stock.gradients, full.gradients, strict=True)
    ]
    assert min(errors) > 0.05  # mean of means
    assert abs(oracle.signed_residual(stock.gradients[-1], full.gradients[-1])) > 0.1  # last window


def test_a_closure_that_is_called_repeatedly(tmp_path):
    full = Module(torch.optim.LBFGS, lr=0.5, max_iter=4)
    ours = attach(
        Module(torch.optim.LBFGS, lr=0.5, max_iter=4), budget=BUDGET, weight="shifted_tokens"
    )
    fit(tmp_path, full), fit(tmp_path, ours)
    assert len(full.calls) == 4 * len(full.losses)
    same(ours, full)


def test_a_checkpoint_goes_on_where_that_of_whole_batches_does(tmp_path):
    runs = []
    for kind in ("full", "ours"):
        modules = [Module(torch.optim.SGD, momentum=0.9) for _ in range(2)]
        if kind == "ours":
            modules = [attach(m, budget=BUDGET, weight="shifted_tokens") for m in modules]
        keep = ModelCheckpoint(tmp_path / kind, save_last=True, every_n_train_steps=1, save_top_k=0)
        settings = {"max_epochs": -1, "enable_checkpointing": True}
        fit(tmp_path, modules[0], max_steps=2, callbacks=[keep], **settings)
        second = trainer(tmp_path, max_steps=5, **settings)
        second.fit(modules[1], loader(), ckpt_path=keep.last_model_path, weights_only=False)
        assert second.global_step == 5
        runs.append(modules[1])
    assert len(runs[0].gradients) == 3
    same(runs[1], runs[0])


def test_mixed_precision_scales_each_micro_batch_and_unscales_once(tmp_path):
    def plugin():
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))

    runs = []
    for plugins in ([], [plugin()]):
        module = Module()
        module.net.float()
        attach(module, budget=BUDGET, weight="shifted_tokens")
        fit(tmp_path, module, precision=None, plugins=plugins, gradient_clip_val=0.5, max_epochs=1)
        runs.append(module)
    for found, expected in zip(runs[1].gradients, runs[0].gradients, strict=True):
        assert oracle.error(found, expected) < 0.02  # of float16; 1,024 if it were not unscaled
        assert abs(oracle.signed_residual(found, expected)) < 0.02


def test_inputs_of_another_kind_and_a_step_without_index(tmp_path):
    class Plain(Module):
        def training_step(self, batch):
            x, y = batch
            return F.cross_entropy(self.net(x)[:, -1], y[:, 0])

    g = torch.Generator().manual_seed(0)
    data = torch.utils.data.TensorDataset(
        torch.randint(1, models.VOCAB, (21, 6), generator=g),
        torch.randint(1, models.VOCAB, (21, 1), generator=g),
    )
    batches = torch.utils.data.DataLoader(data, batch_size=8)
    full, ours = Plain(), attach(Plain(), budget=gradaccum.Budget(examples=3))
    fit(tmp_path, full, batches), fit(tmp_path, ours, batches)
    assert ours.accumulation.last.num_micros == 2
    same(ours, full)


class Summed(Module):
    def training_step(self, batch, batch_idx):
        terms, _ = models.oracle_loss(self.net, batch)
        self.log("loss", terms["loss"], reduce_fx="sum")
        return terms["loss"]


class Contrastive(Module):
    def training_step(self, batch, batch_idx):
        x = self.net(batch["input_ids"]).mean(1)
        return F.cross_entropy(x @ x.T, torch.arange(len(x)))


def test_a_sum_is_measured_and_logged_as_one(tmp_path):
    full, ours = Summed(lr=1e-3), attach(Summed(lr=1e-3), budget=BUDGET)
    expected, found = fit(tmp_path, full), fit(tmp_path, ours)
    same(ours, full)
    same_logs(found.logger, expected.logger)


def test_rows_that_depend_on_each_other_are_refused(tmp_path):
    with pytest.raises(NotDecomposable, match="in-batch negatives"):
        fit(tmp_path, attach(Contrastive(), budget=BUDGET))


def test_a_loss_in_16_bits_is_measured_as_such(tmp_path):
    full, ours = Module(), attach(Module(), budget=BUDGET)
    for module in (full, ours):
        module.net.float()
        fit(tmp_path, module, precision="bf16-mixed", max_epochs=1)
    for found, expected in zip(ours.gradients, full.gradients, strict=True):
        assert oracle.error(found, expected) < 0.02  # of bfloat16 in forward and backward
        assert abs(oracle.signed_residual(found, expected)) < 0.01


def test_other_outputs_are_dropped_with_a_warning(tmp_path):
    class More(Module):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) | {"logits": 0}

    with pytest.warns(UserWarning, match="returns logits for each micro-batch"):
        fit(tmp_path, attach(More(), budget=BUDGET, weight="shifted_tokens"), max_epochs=1)


def test_whole_batches_reach_the_hooks_that_change_them(tmp_path):
    class Mixed(Module):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            order = torch.arange(len(batch["labels"])).flip(0)
            return {**batch, "position_ids": batch["position_ids"][order]}

    full, ours = Mixed(), attach(Mixed(), budget=BUDGET, weight="shifted_tokens")
    fit(tmp_path, full), fit(tmp_path, ours)
    same(ours, full)


@pytest.mark.parametrize("weight", ["shifted_tokens", None])
def test_copies_are_their_own(tmp_path, weight):
    ours = attach(Module(), budget=BUDGET, weight=weight)
    other = copy.deepcopy(ours)
    full = Module()
    fit(tmp_path, other), fit(tmp_path, full)
    same(other, full)
    assert ours.accumulation.last is None and other.accumulation.accumulator.model is other


class Manual(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Skipping(Module):
    def training_step(self, batch, batch_idx):
        return None


class Keeping(Module):
    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        pass


class Normalised(Module):
    def __init__(self):
        super().__init__()
        self.net.dropout = nn.BatchNorm1d(8, dtype=torch.float64, track_running_stats=False)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (Manual, {}, "manual optimization"),
        (Module, {"accumulate_grad_batches": 4}, "divides each loss by 4"),
        (
            Module,
            {"callbacks": [GradientAccumulationScheduler({0: 2})]},
            "accumulate_grad_batches=2",
        ),
        (Skipping, {}, "returned NoneType"),
        (Keeping, {}, "gradients of an unfinished step"),
    ],
)
def test_what_cannot_be_exact_is_refused(tmp_path, kind, settings, message):
    with pytest.raises(BadInput, match=message):
        fit(tmp_path, attach(kind(), budget=BUDGET, weight="shifted_tokens"), **settings)


def test_batch_norm_is_refused(tmp_path):
    with pytest.raises(NotDecomposable, match="BatchNorm"):
        fit(tmp_path, attach(Normalised(), budget=BUDGET, weight="shifted_tokens"))


def test_a_compiled_module_is_refused(tmp_path):
    ours = attach(Module(), budget=BUDGET, weight="shifted_tokens")
    with pytest.raises(BadInput, match="replaced on the module"):
        fit(tmp_path, torch.compile(ours, backend="eager"))


def test_attach_refuses_what_it_cannot_cut():
    class Fetching(Module):
        def training_step(self, dataloader_iter):
            pass

    with pytest.raises(BadInput, match="fetches batches itself"):
        attach(Fetching(), budget=BUDGET)
    with pytest.raises(BadInput, match="attached already"):
        attach(attach(Module(), budget=BUDGET), budget=BUDGET)
    with pytest.raises(BadInput, match="not CausalLM"):
        attach(models.model(), budget=BUDGET)


class MeanLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = models.model()

    def forward(self, **batch):
        return token_mean(self.net, batch)[0]


def fabric_gradients(run):
    fabric = Fabric(accelerator="cpu", devices=1)  # its "64-true" rounds the loss to float32
    model = MeanLoss()
    prepared, _ = fabric.setup(model, torch.optim.SGD(model.parameters(), 0.1))
    run(fabric, prepared)
    return oracle.left_in(model)


def test_fabric():
    batch = models.collated(models.examples(LENGTHS))

    def whole(fabric, model):
        fabric.backward(model(**batch))

    def stock(fabric, model):
        parts = [models.collated(models.examples(LENGTHS)[i : i + 2]) for i in range(0, 22, 2)]
        for i, part in enumerate(parts):
            with fabric.no_backward_sync(model, enabled=i < len(parts) - 1):
                fabric.backward(model(**part) / len(parts))

    def ours(fabric, model):
        objective = gradaccum.from_mean(
            lambda model, micro: model(**micro), weight="shifted_tokens"
        )
        accumulator = gradaccum.Accumulator(
            model, objective, budget=BUDGET, backward=fabric.backward
        )
        assert accumulator.backward(batch).num_micros > 4

    expected = fabric_gradients(whole)
    assert oracle.error(fabric_gradients(ours), expected) <= 1e-12
    assert oracle.error(fabric_gradients(stock), expected) > 0.05


def test_a_run_that_is_watched_is_the_same_run_and_tells_it(tmp_path):
    full = Module()
    expected = fit(tmp_path, full, val=loader())
    ours = attach(Module(), budget=BUDGET, weight="shifted_tokens")
    watching = Watching(tmp_path / "told", live=False, noise_every=2)
    found = fit(tmp_path, ours, val=loader(), callbacks=[watching])
    same(ours, full)
    own = [{k: v for k, v in row.items() if "gradaccum/" in k} for _, row in found.logger.rows]
    rest = [(s, {k: v for k, v in row.items() if "gradaccum/" not in k}) for s, row in
            found.logger.rows]  # fmt: skip
    found.logger.rows = [(step, row) for step, row in rest if row]
    same_logs(found.logger, expected.logger)
    sizes = [row["gradaccum/num_examples"] for row in own if row]
    assert sizes == [8, 8, 6, 8, 8, 6]
    run = read(tmp_path / "told")
    assert run.steps == [1, 2, 3, 4, 5, 6] and run.last("samples") == 44
    assert run.known("loss") == pytest.approx(full.losses, rel=1e-12)
    assert run.column("learning_rate") == [0.1, 0.1, 0.05, 0.05, 0.025, 0.025]
    assert run.column("num_examples") == sizes and run.known("data_seconds") == []
    assert watching.watch.noise.state_dict()["moments"][0] == 3  # measured steps


def test_a_resumed_run_is_watched_on(tmp_path):
    made = []
    for steps, path in ((2, None), (5, tmp_path / "kept" / "last.ckpt")):
        module = attach(Module(), budget=BUDGET, weight="shifted_tokens")
        made.append(Watching(tmp_path / "told", live=False, noise_every=1))
        keep = ModelCheckpoint(tmp_path / "kept", save_last=True, every_n_train_steps=1)
        ended = trainer(
            tmp_path,
            max_steps=steps,
            max_epochs=-1,
            enable_checkpointing=True,
            callbacks=[made[-1], keep],
        )
        ended.fit(module, loader(), ckpt_path=path, weights_only=False)
    run = read(tmp_path / "told")
    assert run.steps == [1, 2, 3, 4, 5] and run.column("samples") == [8, 16, 24, 32, 40]
    assert made[-1].watch.noise.state_dict()["moments"][0] == 5


def test_watching_a_module_that_is_not_attached(tmp_path):
    with pytest.raises(BadInput, match="not attached"):
        fit(tmp_path, Module(), callbacks=[Watching(live=False)])
