"""What each framework's adapter can do: the table of docs/abilities.md, from the tests that say so.

    python tests/abilities.py --write

A "yes" is a test: its file, from tests/adapters/FRAMEWORK on, and its name. A "no" is a reason.
"""

from __future__ import annotations

import ast
import functools
import sys
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "abilities.md"
FRAMEWORKS = {"torch": "PyTorch", "jax": "JAX", "keras": "Keras"}


class Yes(NamedTuple):
    """It can.

    Attributes:
        test: the test that says so, "file::name".
        how: how it is written there, where it has another name.
    """

    test: str
    how: str = ""


class No(NamedTuple):
    """It cannot, for a reason."""

    reason: str


class Ability(NamedTuple):
    """One thing, in each framework."""

    what: str
    torch: Yes | No
    jax: Yes | No
    keras: Yes | No


def in_all(what: str, test: str, **how: str) -> Ability:
    """What the contract holds every adapter to."""
    name = f"../contract.py::{test}"
    return Ability(what, *(Yes(name, how.get(each, "")) for each in FRAMEWORKS))


ORACLE = "test_the_term_equals_the_oracle"
RESUMED = "test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit"

ABILITIES: dict[str, list[Ability]] = {
    "Objectives": [
        in_all("the term and its gradients equal an independent formula", ORACLE),
        in_all(
            "five steps give the same numbers in all three", "test_five_steps_equal_the_reference"
        ),
        in_all("several objectives at once", "test_metrics_of_a_list_carry_the_objectives_names"),
        Ability(
            "an objective of yours",
            Yes("test_objectives.py::test_a_third_partys_objective_is_served_as_it_is"),
            Yes("test_objectives.py::test_heads_are_as_the_objectives_say"),
            Yes("test_objectives.py::test_a_third_partys_objective_trains_as_it_is"),
        ),
        Ability(
            "a mask over samples or tokens",
            Yes("test_objectives.py::test_masks_over_samples_and_tokens", "`loss_mask=`"),
            Yes("test_step.py::test_mask_leaves_out_samples_or_tokens", "`mask=`"),
            Yes("test_objectives.py::test_a_mask_leaves_samples_out_of_the_term", "in the data"),
        ),
        Ability(
            "weights of samples and classes",
            No("a mask holds weights"),
            No("a mask holds weights"),
            Yes("test_weights.py::test_a_weight_counts_a_sample", "as in `fit`"),
        ),
        Ability(
            "draws of yours for the gap",
            Yes("test_contract.py::test_the_term_equals_the_oracle", "`u=`"),
            Yes("test_contract.py::test_the_term_equals_the_oracle", "`u=`"),
            No("`fit` draws times, noise and gaps inside; `draw_time=` gives times"),
        ),
    ],
    "Models": [
        Ability(
            "a model that nobody edited",
            Yes("test_families.py::test_compile"),
            Yes("test_tapped.py::test_tokens_and_gradients_are_those_of_the_forward_by_hand"),
            Yes("test_hub.py::test_mmdit_trains_unedited_and_comes_back_from_its_file"),
        ),
        Ability(
            "two modules by their paths",
            Yes("test_lists.py::test_taps_by_name", "`taps=`"),
            Yes("test_tapped.py::test_two_paths_name_the_modules"),
            Yes("test_blocks.py::test_layers_may_be_given_by_name", "`taps=`"),
        ),
        Ability(
            "the sample's tokens are found among others",
            Yes("test_finding.py::test_the_samples_tokens_alone_are_aligned"),
            No("not looked for: `select=` takes them"),
            No("not looked for: `select=` takes them"),
        ),
        Ability(
            "blocks under scan",
            No("PyTorch has no scan over modules"),
            Yes("test_tapped.py::test_the_teacher_runs_its_first_blocks_alone"),
            No("Keras has no scan over layers"),
        ),
        Ability(
            "frozen parameters shared with the teacher (LoRA)",
            Yes(
                "test_average.py::test_lora_student_of_peft_has_its_base_in_common_with_the_teacher"
            ),
            Yes("test_teacher.py::test_frozen_leaves_are_the_students_own", "`trained=`"),
            No("each Keras layer holds variables of its own; frozen ones are not averaged"),
        ),
    ],
    "The teacher": [
        Ability(
            "runs to its layer only",
            Yes("test_term.py::test_teachers_compute_is_exactly_the_blocks_up_to_its_layer"),
            Yes("test_cost.py::test_the_teacher_costs_its_prefix_and_no_more"),
            Yes("test_step.py::test_the_teacher_runs_to_its_layer_only"),
        ),
        Ability(
            "evaluation mode, whatever the model's",
            Yes("test_average.py::test_teacher_is_an_exact_copy_in_eval_mode_without_gradient"),
            Yes("test_tapped.py::test_nnx_trains_as_it_is_and_teaches_in_evaluation_mode"),
            Yes("test_step.py::test_a_step_is_the_papers_formula"),
        ),
        Ability(
            "an EMA of yours",
            Yes("test_following.py::test_an_ema_of_the_users_is_the_teacher", "`teacher=`"),
            Yes(
                "test_teacher.py::test_an_average_of_the_users_teaches_with_metrics_in_one_call",
                "`Teacher(average, step)`",
            ),
            No("`fit` keeps the average; `ema_backbone()` gives it to you"),
        ),
        Ability(
            "in half precision, averages in float32",
            Yes(
                "test_average.py::test_a_half_precision_teacher_has_float32_averages",
                "`EMATeacher(dtype=)`",
            ),
            Yes("test_teacher.py::test_ema_of_half_precision_is_float32_and_moves"),
            Yes("test_fit.py::test_mixed_precision", "by the policy"),
        ),
        Ability(
            "in the host's memory",
            Yes(
                "test_average.py::test_an_offloaded_ema_gives_the_same_numbers",
                "`EMATeacher(offload=)`",
            ),
            Yes(
                "../../test_docs.py::test_blocks_run",
                "[how](jax.md#the-average-in-the-hosts-memory)",
            ),
            No("Keras places variables by itself"),
        ),
        Ability(
            "for a part of each batch",
            Yes(
                "test_fraction.py::test_a_fraction_is_the_term_of_the_first_samples",
                "`batch_fraction=`",
            ),
            Yes(
                "test_step.py::test_a_fraction_of_the_batch_is_the_term_of_the_first_samples",
                "slice",
            ),
            No("batches have a static shape there: use a mask"),
        ),
        Ability(
            "moves in every n-th step only",
            Yes(
                "test_average.py::test_the_average_moves_in_every_third_step_only",
                "`schedules.Every`",
            ),
            Yes(
                "test_teacher.py::test_the_average_moves_in_every_third_step_only",
                "`schedules.Every`",
            ),
            Yes("test_contract.py::test_five_steps_equal_the_reference", "`schedules.Every`"),
        ),
    ],
    "The loop": [
        Ability(
            "accumulated gradients are one step of the EMA",
            Yes("test_term.py::test_accumulated_gradients_are_those_of_the_whole_batch"),
            Yes("test_teacher.py::test_accumulated_gradients_are_one_step", "`stepped=`"),
            Yes("test_step.py::test_gradient_accumulation_moves_the_ema_once_per_optimizer_step"),
        ),
        Ability(
            "a step that loss scaling skips is none of the EMA",
            Yes("test_watch.py::test_a_step_that_the_scaler_skips_is_no_step"),
            Yes("test_teacher.py::test_the_teacher_follows_the_optimizers_steps", "`stepped=`"),
            Yes("test_step.py::test_a_step_that_loss_scaling_skips_moves_nothing"),
        ),
        Ability(
            "validation changes nothing",
            Yes("test_student.py::test_validation_between_two_steps_changes_nothing"),
            No("pure functions: nothing could change"),
            Yes("test_promises.py::test_validation_repeats_itself_and_changes_nothing"),
        ),
        in_all("metrics of each step", "test_metrics_of_one_objective"),
        Ability(
            "a factor that follows a plateau",
            No("the term is yours: multiply it"),
            No("the term is yours: multiply it"),
            Yes("test_promises.py::test_a_callback_may_scale_the_terms", "`model.factor`"),
        ),
        in_all(
            "weight 0 keeps all gradients defined", "test_weight_0_keeps_every_gradient_defined"
        ),
    ],
    "Checks": [
        Ability(
            "labels dropped inside the model",
            Yes(
                "test_law.py::test_labels_dropped_inside_the_model_are_dropped_in_the_teacher",
                "dropped alike, or refused",
            ),
            Yes("test_checking.py::test_what_differs_is_said", "`check`, once"),
            Yes("test_law.py::test_a_dropped_condition_is_refused", "refused"),
        ),
        Ability(
            "another call of the teacher, a path that runs the other way",
            Yes("test_layout.py::test_another_time_than_the_students"),
            Yes("test_checking.py::test_what_is_not_on_the_path_is_refused", "`check`, once"),
            No("both sides are called inside, alike"),
        ),
        Ability(
            "features that are not finite",
            Yes("test_watch.py::test_and_are_an_error_where_that_is_asked_for", 'checks="finite"'),
            No("the loss shows them, and `jax_debug_nans` finds them"),
            No("`keras.callbacks.TerminateOnNaN` sees the loss"),
        ),
        in_all("bad input is refused, and changes nothing", "test_a_refused_batch_changes_nothing"),
    ],
    "Checkpoints": [
        in_all("a resumed run equals the uninterrupted one", RESUMED),
        Ability(
            "settings travel with the state",
            Yes("test_state.py::test_state_of_other_settings_is_refused_and_changes_nothing"),
            Yes(
                "test_restoring.py::test_other_settings_are_refused_or_said_to_be_meant",
                "`teacher_state`",
            ),
            Yes("test_saving.py::test_weights_of_other_settings_are_refused"),
        ),
        Ability(
            "going on with another weight or decay",
            Yes(
                "test_state.py::test_a_run_goes_on_with_other_settings_where_that_is_asked_for",
                "`changed=`",
            ),
            Yes(
                "test_restoring.py::test_other_settings_are_refused_or_said_to_be_meant",
                "`changed=`",
            ),
            No("a file keeps its settings; `backbone.save` is free of them"),
        ),
    ],
    "Many devices": [
        Ability(
            "data parallel, sharded weights",
            Yes("test_distributed.py::test_two_processes_equal_one"),
            Yes(
                "test_sharding.py::test_training_gives_the_numbers_of_one_device_and_keeps_the_sharding"
            ),
            Yes(
                "test_distribution.py::test_model_parallel_gives_the_numbers_of_one_device",
                "jax backend",
            ),
        ),
    ],
    "Tools": [
        Ability(
            "`selfalign check`",
            Yes("../../cli/test_check.py::test_check_of_a_dit"),
            No("`sra.check`, in your own code"),
            Yes(
                "../../cli/test_check.py::test_check_of_keras_models", "its layers, without a step"
            ),
        ),
        Ability(
            "features for the diagnostics",
            Yes("test_features.py::test_equals_hooks_by_hand", "`features()`"),
            Yes(
                "../../test_docs.py::test_blocks_run", "[how](jax.md#features-for-the-diagnostics)"
            ),
            Yes(
                "../../test_docs.py::test_blocks_run",
                "[how](keras.md#features-for-the-diagnostics)",
            ),
        ),
    ],
}


def page() -> str:
    """The page as Markdown."""
    lines = [
        "# What works in which framework",
        "",
        'Each "yes" is a test that runs with the suite. `tests/abilities.py` has their names and '
        "makes this page.",
        "",
    ]
    for group, abilities in ABILITIES.items():
        titles = (group, *FRAMEWORKS.values())
        lines += ["| " + " | ".join(titles) + " |", "| --- | --- | --- | --- |"]
        for ability in abilities:
            cells = (ability.what, *map(_cell, ability[1:]))
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(found: Yes | No) -> str:
    if isinstance(found, No):
        return f"no: {found.reason}"
    return f"yes: {found.how}" if found.how else "yes"


def tests() -> list[tuple[str, str]]:
    """The framework and the test of each "yes"."""
    named = []
    for abilities in ABILITIES.values():
        for ability in abilities:
            for framework, found in zip(FRAMEWORKS, ability[1:], strict=True):
                if isinstance(found, Yes):
                    named.append((framework, found.test))
    return named


def exists(framework: str, test: str) -> bool:
    """Whether there is such a test."""
    file, _, name = test.partition("::")
    path = (TESTS / "adapters" / framework / file).resolve()
    return path.exists() and name in _functions(path)


@functools.cache
def _functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    # the contract's tests are each adapter's own, by one import
    if path.name == "test_contract.py":
        names |= _functions(TESTS / "adapters" / "contract.py")
    return names


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(page())
    else:
        print(page())
