"""Stage 4: adapters and router fine-tuned together, so that the language-model loss reaches the router.

Each prompt goes through the soft mixture that the router gives it; the router's labels are a second, supervised term;
the base stays frozen, or has a tiny rate of its own. Afterwards the router's prototypes and temperature are fitted
anew. The result is published only if no domain lost and the router still uses them all: else the artifacts of stage 3
stay, and the reason is printed.
"""

import copy
import time
from functools import partial

import torch
from torch import Tensor, nn

from cluster.config.training import StageSettings
from cluster.errors import InvalidInput
from cluster.messages import NONE_DOMAIN
from cluster.router.reliability import effective_number
from cluster.router.tiny_ada import TinyAda
from cluster.training.data import DataSet, Row, collate, encode, stage_data
from cluster.training.joint_system import JointSystem, effective_domains, load_system
from cluster.training.language_model import batch_loss
from cluster.training.optimization import Optimizer, load_checkpoint, save_checkpoint
from cluster.training.run import Run
from cluster.training.stage_adapters import padding_id
from cluster.training.stage_router import chosen_domain, router_columns, router_rows, routing_summary

_CLEARLY_BETTER = 0.01
"""Share of held-out prompts by which rebuilt prototypes must route better to be taken."""


def train_joint(settings: StageSettings, run: Run) -> None:
    """Fine-tune all adapters and the router together; publish them in one generation, or nothing."""
    recipe, options = settings.recipe, settings.recipe.joint
    if options.num_steps == 0:
        run.say("the recipe leaves the joint stage out")
        return
    system = load_system(settings, run)
    data = stage_data(settings, run)
    before = system.losses(data, settings)
    if not before:
        run.say("not trained: without validation rows nobody could tell whether a domain loses")
        return
    labels = {*system.router.domains, NONE_DOMAIN}
    train, held_out = (
        [row for row in router_rows(data, split, recipe.train_rows_per_domain) if row.domain in labels]
        for split in ("train", "val")
    )
    used_before = effective_domains(system.router, held_out)
    _fit(system, data, settings, run)
    system.round_base(settings)
    router = _calibrated(system.router, train, held_out, recipe.router.target_false_rejection)
    after, used = system.losses(data, settings), effective_domains(router, held_out)
    changes = {domain: after[domain] / before[domain] - 1 for domain in before}
    table = ", ".join(f"{domain} {change:+.1%}" for domain, change in changes.items())
    run.say(f"joint stage, change of validation loss: {table}; router {routing_summary(router, held_out)}")
    run.say(f"effective number of domains: {used_before:.1f} before, {used:.1f} after")
    stay = "the adapters and the router of stage 3 stay"
    if (loser := _loser(before, after, settings)) is not None:
        run.say(f"not published: {loser} lost {changes[loser]:.1%}, more than {options.epsilon:.1%}; {stay}")
    elif used < options.least_effective_share * used_before:
        run.say(
            f"not published: the router collapses, its prompts use {used:.1f} domains in effect where they used "
            f"{used_before:.1f}, less than {options.least_effective_share:.0%} of it; {stay}"
        )
    else:
        run.say(system.publish(router, settings))


def _calibrated(router: TinyAda, train: list[Row], held_out: list[Row], target: float) -> TinyAda:
    """The router with temperature and threshold fitted anew, and its prototypes too if that clearly routes better.

    The encoder was trained against the prototypes, so they mostly still stand where they should.
    """
    rebuilt = copy.deepcopy(router)
    rebuilt.refit(*router_columns(train), *router_columns(held_out), target)
    router.recalibrate(*router_columns(held_out), target)
    gain = _share_right(rebuilt, held_out) - _share_right(router, held_out)
    return rebuilt if gain > _CLEARLY_BETTER else router


def _share_right(router: TinyAda, rows: list[Row]) -> float:
    decisions = router.route([row.bare_prompt for row in rows])
    return sum(chosen_domain(d) == row.domain for d, row in zip(decisions, rows, strict=True)) / len(rows)


def _loser(before: dict[str, float], after: dict[str, float], settings: StageSettings) -> str | None:
    """The domain that lost most, if it lost more than the recipe allows."""
    options = settings.recipe.joint
    allowed = {domain: max(loss * options.epsilon, options.tolerance_nats) for domain, loss in before.items()}
    # What is no number has lost too.
    losers = [domain for domain in before if not after[domain] - before[domain] <= allowed[domain]]
    return max(losers, key=lambda domain: after[domain] / before[domain], default=None)


def _fit(system: JointSystem, data: DataSet, settings: StageSettings, run: Run) -> None:
    recipe, options = settings.recipe, settings.recipe.joint
    optimizers = _optimizers(system, settings)
    known = set(system.adapters.domains) & set(data.domains)
    rows = {domain: data.rows("train", domain, recipe.train_rows_per_domain) for domain in sorted(known)}
    if none_rows := data.rows("train", NONE_DOMAIN, recipe.train_rows_per_domain):
        # Without these the router would only be rewarded for naming some domain.
        rows[NONE_DOMAIN] = none_rows
    first = 0
    if (checkpoint := run.restore()) is not None:
        first, tensors = load_checkpoint(checkpoint)
        for name, optimizer in optimizers.items():
            optimizer.load_tensors(tensors, f"{name}|")
        run.say(f"resuming the joint stage at step {first}")
    run.start("4/4 joint", options.num_steps)
    tokens, since = 0, time.perf_counter()
    for step in range(first, options.num_steps):
        drawn = _draw(rows, step, settings)
        log_probabilities_BN = system.router.scores([row.prompt for row in drawn])
        loss, num_tokens = _joint_loss(system, drawn, log_probabilities_BN, settings)
        loss.backward()
        if not all(optimizer.step(step) for optimizer in optimizers.values()):
            raise InvalidInput(
                f"The loss of the joint stage or its gradients are no finite numbers at step {step + 1}; what stage 3 "
                "published stays. Give it lower rates, or leave it out (num_steps 0)."
            )
        tokens += num_tokens
        speed = tokens / (time.perf_counter() - since)
        run.report(step + 1, {"loss": float(loss.detach()), "tokens/s": speed, **_spread(log_probabilities_BN)})
        if (step + 1) % recipe.checkpoint_every_steps == 0:
            done, state = step + 1, {k: v for n, o in optimizers.items() for k, v in o.tensors(f"{n}|").items()}
            run.checkpoint(partial(save_checkpoint, step=done, tensors=state))


def _optimizers(system: JointSystem, settings: StageSettings) -> dict[str, Optimizer]:
    options = settings.recipe.joint
    factors = {
        f"{domain}:{name}": parameter
        for domain in system.adapters.domains
        for name, parameter in system.adapters.parameters(domain).items()
    }
    encoder = {name: parameter for name, parameter in system.router.named_parameters() if parameter.requires_grad}
    optimizers = {
        "adapters": Optimizer(factors, options.adapter_learning_rate, options.num_steps),
        "router": Optimizer(encoder, options.router_learning_rate, options.num_steps),
    }
    if system.trains_base:
        optimizers["base"] = Optimizer(system.base_parameters, options.base_learning_rate, options.num_steps)
    return optimizers


def _spread(log_probabilities_BN: Tensor) -> dict[str, float]:
    """What tells a router that collapses onto few domains: how many the batch uses in effect, and how unsure it is of
    each prompt (mean entropy, nats). The last column is none.
    """
    p_BN = log_probabilities_BN.detach().exp()
    used = effective_number(p_BN[:, :-1].sum(dim=0).tolist())
    return {"effective_domains": used, "entropy": float(torch.special.entr(p_BN).sum(dim=1).mean())}


def _draw(rows: dict[str, list[Row]], step: int, settings: StageSettings) -> list[Row]:
    """Rows of a step, evenly over the domains."""
    generator = torch.Generator().manual_seed(settings.recipe.seed * 1_000_003 + step)
    return [
        candidates[int(torch.randint(len(candidates), (), generator=generator))]
        for candidates in rows.values()
        for _ in range(settings.recipe.joint.rows_per_domain)
    ]


def _joint_loss(
    system: JointSystem, rows: list[Row], log_probabilities_BN: Tensor, settings: StageSettings
) -> tuple[Tensor, int]:
    """Language-model loss through soft mixtures plus the weighted loss of the router's labels, and the tokens seen."""
    options, device = settings.recipe.joint, system.base.model.device
    examples = encode(system.base.tokenizer, rows, options.max_tokens)
    batch = collate([[example] for example in examples], padding_id(system.base.tokenizer), learn_prompts=False)
    # The last column is none: its probability is the share of the plain base.
    system.adapters.mix(log_probabilities_BN[:, :-1].exp().to(device), batch.ids_BT.shape[1])
    names = (*system.router.domains, NONE_DOMAIN)
    labels = torch.tensor([names.index(row.domain) for row in rows])
    routing = nn.functional.nll_loss(log_probabilities_BN, labels)
    loss = batch_loss(system.base.model, batch) + options.router_loss_weight * routing.to(device)
    return loss, batch.ids_BT.numel()
