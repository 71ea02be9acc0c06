"""The fourteen faults that users of other KV-cache compressions meet most, and the tests that would show ours.

Each case is one kind of fault, reported again and again against quantised, evicting or compiled caches elsewhere. What
a test near its code covers already is only named here.

R1   rows and tokens of a cache are moved (beams, crops, copies, resets) and codes are left behind
R2   dropping tokens that nobody attends to changes the output; a little less budget changes much
R3   a row depends on its batch mates, on padding, or on the first tokens' sizes
R4   a sliding window goes wrong where it fills, and an unknown window is taken for none
R5   biased keys (Qwen2) turn into noise without a word
R6   some head_dim or GQA group is not supported, or wrong
R7   scale, soft cap, sinks, masks or a permutation are lost in the match
R8   rotary embeddings that are partial, interleaved or scaled are taken for the plain one
R9   codes depend on chunks, are made again from decoded values, or do not nest
R10  the whole prompt is coded, window and all; a short prompt is emptied
R11  the whole cache is copied at each step; a clone and its original become one
R12  each generate() or cache compiles again; a changed option is served a stale graph
R13  the compressed cache takes more memory than the dense one, or is never freed
R14  speculative decoding and codes do not go together
"""

import ast
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
CASES = {
    "R1": [
        "lifecycle/test_surface.py::test_r1_a_step_after_an_operation_is_the_dense_one",
        "lifecycle/test_surface.py::test_r1_rows_move_as_codes",
        "lifecycle/test_door1.py::test_the_run_of_a_dense_cache",
        "lifecycle/test_ownership.py::TestCopies::test_a_deepcopy_and_its_original_go_on_alike",
        "lifecycle/test_ownership.py::TestCopies::test_a_copy_is_not_touched_by_its_original",
        "ops/test_append.py::test_any_run_of_writes_and_rollbacks",
    ],
    "R2": [
        "runtime/test_retention.py::test_tokens_that_get_no_attention_may_go",
        "runtime/test_retention.py::test_a_little_less_than_all_is_nearly_all",
        "runtime/test_retention.py::test_a_budget_for_all_keeps_all",
        "policies/test_rdr.py::test_what_no_query_looks_at_goes_first",
    ],
    "R3": [
        "cases/test_codes.py::test_r3_a_row_in_a_batch_is_the_row_alone",
        "cases/test_codes.py::test_r3_a_padded_row_is_the_row_without_its_padding",
        "cases/test_codes.py::test_r3_a_key_larger_than_all_before_it_is_not_clipped",
        "ops/test_append.py::test_a_padded_row_has_the_codes_of_the_row_alone",
        "lifecycle/test_kinds.py::TestPadding::test_a_left_padded_batch_generates_what_its_rows_do_alone",
        "lifecycle/test_kinds.py::TestPadding::test_an_import_of_a_padded_batch_codes_its_rows_alike",
        "codecs/test_keys.py::test_a_span_does_not_depend_on_its_batch",
    ],
    "R4": [
        "cases/test_shapes.py::test_r4_prompts_that_end_about_the_edge_of_the_window",
        "lifecycle/test_surface.py::test_r14_a_window_may_be_cropped_until_it_fills",
        "lifecycle/test_kinds.py::TestSliding::test_through_the_edge_and_on",
        "patterns/test_transformers_layers.py::test_sliding_fills_and_rolls",
        "patterns/test_transformers_layers.py::test_sliding_through_a_chunk_across_the_edge",
        "patterns/test_transformers_layers.py::test_a_dynamic_window_is_refused",
        "patterns/test_sliding.py::test_verdict_numbers_and_contents",
    ],
    "R5": [
        "surface/test_explain.py::test_r5_biased_keys_are_seen_before_use",
        "surface/test_explain.py::test_r5_the_bits_that_are_named_are_enough",
        "surface/test_explain.py::test_r5_a_users_own_call_is_looked_at_too",
        "surface/test_report.py::test_biased_keys_are_flagged_and_plain_ones_are_not",
        "surface/test_report.py::test_logit_noise_is_what_the_certificate_says",
        "eval/test_eval_biased_keys.py",
    ],
    "R6": [
        "cases/test_shapes.py::test_r6_every_head_dim_and_group",
        "cases/test_shapes.py::test_r6_a_models_step_is_the_dense_one",
        "ops/test_attend.py::test_head_dims_and_groups",
        "ops/test_append.py::test_head_dims_and_dtypes",
        "passes/test_normalize.py::test_repeated_heads_fold",
    ],
    "R7": [
        "cases/test_shapes.py::test_r7_models_that_are_no_sdpa_say_so_and_stay_right",
        "patterns/test_static_index.py::own_scale",
        "patterns/test_static_index.py::additive_mask",
        "patterns/test_static_index.py::additive_mask_of_each_head",
        "patterns/test_static_index.py::mask_of_each_row",
        "patterns/test_static_index.py::test_bfloat16_cache_and_mask",
        "patterns/test_static_index.py::permuted_and_back",
        "patterns/test_static_index.py::keys_read_with_tokens_and_dimensions_exchanged",
        "patterns/test_static_index.py::keys_read_with_heads_and_tokens_exchanged",
        "patterns/test_static_index.py::values_laid_out_the_other_way",
        "patterns/test_attention.py::soft_cap",
        "patterns/test_attention.py::learned_sinks",
        "passes/test_match.py::test_models_that_stay_dense",
        "ops/test_attend.py::test_scale",
    ],
    "R8": [
        "cases/test_shapes.py::test_r8_a_models_step_is_the_dense_one",
        "passes/test_rope.py::test_families",
        "passes/test_rope.py::test_scaled_rope",
        "passes/test_rope.py::test_almost",
        "ops/test_append.py::test_pair_scales_follow_the_rotary_embedding",
        "codecs/test_scales.py::test_commutes_with_rope",
        "runtime/test_retention.py::test_how_positions_turn_keys_is_learnt",
    ],
    "R9": [
        "cases/test_codes.py::test_r9_chunks_give_the_codes_of_one_shot",
        "cases/test_codes.py::test_r9_what_is_read_ten_times_is_never_coded_again",
        "ops/test_append.py::test_one_shot_chunks_and_single_tokens_give_the_same_codes",
        "lifecycle/test_ownership.py::TestImportAndExport::test_ten_flushes_leave_the_codes_bit_equal",
        "codecs/test_keys.py::test_demotion_equals_direct_encoding",
        "codecs/test_keys.py::test_demotion_step_by_step_keeps_the_codes",
        "codecs/test_values.py::test_demotion_equals_direct_encoding",
        "ops/test_moves.py::test_a_moved_token_is_as_if_coded_there",
    ],
    "R10": [
        "lifecycle/test_surface.py::test_r10_sinks_and_window_are_exact_after_prefill",
        "lifecycle/test_door1.py::short_prompts",
        "ops/test_append.py::test_prompts_shorter_than_the_window_are_exact",
        "runtime/test_retention.py::test_short_prompts",
    ],
    "R11": [
        "cases/test_compiler.py::test_r11_nothing_is_copied",
        "cases/test_compiler.py::test_r11_a_clone_that_is_written_leaves_the_original",
        "lifecycle/test_ownership.py::TestCopies::test_a_copy_is_not_touched_by_its_original",
        "ops/test_opcheck.py::test_append",
        "passes/test_verify.py::test_the_dense_cache_is_gone",
    ],
    "R12": [
        "cases/test_compiler.py::test_r12_the_cache_of_graphs_tells_options_apart",
        "lifecycle/test_kinds.py::test_five_generations_with_five_caches_compile_once",
        "lifecycle/test_kinds.py::TestShapes::test_a_cache_of_another_size",
        "lifecycle/test_kinds.py::test_a_growing_cache_passes_its_first_capacity_without_compiling",
        "runtime/test_retention.py::test_resident_bytes_stay_within_the_budget_at_every_step",
    ],
    "R13": [
        "cases/test_memory.py::test_r13_resident_and_peak_bytes_are_below_the_static_cache",
        "cases/test_memory.py::test_r13_half_the_budget_is_half_the_pages",
        "lifecycle/test_kinds.py::test_five_generations_with_five_caches_compile_once",
        "lifecycle/test_ownership.py::TestDeath",
        "surface/test_report.py::test_bytes_are_those_of_the_storages",
        "runtime/test_retention.py::test_resident_bytes_stay_within_the_budget_at_every_step",
    ],
    "R14": [
        "lifecycle/test_surface.py::test_r14_assisted_generation_is_greedy",
        "lifecycle/test_surface.py::test_r14_a_window_may_be_cropped_until_it_fills",
        "lifecycle/test_surface.py::test_r1_a_step_after_an_operation_is_the_dense_one",
    ],
}
"""Case -> ids below tests/: a file, a class, a test, or a function that a table of its file tries."""


@cache
def names(file):
    """Functions and classes of a file, and of its classes."""
    found = set()
    for node in ast.parse((TESTS / file).read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


@pytest.mark.parametrize("case", CASES)
def test_every_test_of_a_case_exists(case):
    for test in CASES[case]:
        file, _, name = test.partition("::")
        assert not name or name in names(file), test


def test_every_case_is_told_and_has_its_tests():
    assert list(CASES) == [line.split()[0] for line in __doc__.splitlines() if line.startswith("R")]
    for file in TESTS.glob("*/test_*.py"):
        for name in names(str(file.relative_to(TESTS))):
            if name.startswith("test_r") and name[6].isdigit():
                case = name.split("_")[1].upper()
                assert f"{file.relative_to(TESTS)}::{name}" in CASES[case], f"{name} is not listed"
