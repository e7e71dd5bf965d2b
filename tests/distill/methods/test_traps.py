"""Forty-two numeric details that a reimplementation of these systems gets wrong, and what holds each of them here.

One row a trap: its number, the trap in a few words, and the tests that fail for who falls into it, or why it cannot happen.
"""

import ast
import re
from pathlib import Path

import pytest

# fmt: off
TRAPS: list[tuple[int, str, tuple[str, ...] | str]] = [
    (1, "time in 0..1 where the network wants 0..1000", (
        "teachers/networks/test_wan.py::test_time_is_a_thousand_sigma",
        "teachers/test_reference_wan.py::test_network_and_teacher_are_the_equations",
    )),
    (2, "[1000, 750, 500, 250] are indices of a table, not times", (
        "teachers/test_flow.py::test_the_grid_runs_from_one_to_zero",
        "distill/methods/test_trap_cases.py::test_the_network_gets_the_published_times_unrounded",
    )),
    (3, "times rounded to bf16 here and not there", (
        "distill/methods/test_trap_cases.py::test_the_network_gets_the_published_times_unrounded",
    )),
    (4, "trajectories, student and DMD with different shifts", (
        "distill/pipeline/test_trajectories.py::test_sigmas_off_the_grid_are_refused_before_any_work",
        "distill/pipeline/test_trajectories.py::test_other_sigmas_and_another_teacher_are_refused_at_load",
        "distill/methods/test_trap_cases.py::test_the_published_recipes_have_the_published_grid_and_betas",
    )),
    (5, "50 solver steps, so the quarter points are not on the grid", (
        "teachers/test_flow.py::test_a_coarser_grid_lies_on_a_finer_one",
        "distill/pipeline/test_trajectories.py::test_sigmas_off_the_grid_are_refused_before_any_work",
    )),
    (6, "sigma looked up by argmin: 0.005 at t = 0", (
        "teachers/test_flow.py::test_a_level_of_each_frame_touches_that_frame_alone",
        "distill/methods/test_trap_cases.py::test_the_context_pass_sees_x0_itself_at_time_zero",
    )),
    (7, "levels of the DMD scores: uniform, shifted, clamped, one a clip", (
        "distill/methods/test_trap_cases.py::test_the_levels_of_dmd_s_scores_have_the_published_distribution",
        "distill/methods/test_methods.py::test_dmd_compares_scores_of_one_noisy_clip",
    )),
    (8, "guidance s against 1 + s", (
        "teachers/test_guidance.py::test_guidance_is_effective_and_counts_its_passes",
    )),
    (9, "a zero embedding is not the embedding of silence", (
        "teachers/encoders/test_wav2vec.py::test_silence_is_encoded_and_is_not_zeros",
        "teachers/test_conditions.py::test_a_dropped_modality_is_zero_and_the_rest_is_untouched",
    )),
    (10, "mask: 0 is known for OmniAvatar, 1 for Wan's image-to-video", (
        "teachers/networks/test_wan.py::test_mask_zero_is_known_and_the_noise_of_a_known_frame_is_not_seen",
        "teachers/test_reference_wan.py::test_the_clean_reference_is_written_over_frame_0_before_the_step_and_after",
    )),
    (11, "known frames: same time, clamped before and after, out of losses and normaliser, by frame and not by channel", (
        "distill/methods/test_trap_cases.py::test_the_network_gets_the_published_times_unrounded",
        "teachers/test_reference_wan.py::test_the_clean_reference_is_written_over_frame_0_before_the_step_and_after",
        "teachers/test_reference_wan.py::test_a_trajectory_is_the_published_sampler",
        "distill/methods/test_losses.py::test_the_mean_leaves_frame_0_out",
        "distill/methods/test_losses.py::test_the_given_frame_does_not_scale_the_others",
        "distill/methods/test_methods.py::test_dmd_descends_from_fake_to_real",
    )),
    (12, "the reference written into a view of the drawn noise", (
        "distill/methods/test_trap_cases.py::test_the_reference_is_written_into_a_copy",
    )),
    (13, "audio features: resampled before the encoder, 14 states, row 0 three times, the frame rate, fp32, normalised", (
        "teachers/encoders/test_wav2vec.py::test_a_whole_clip_equals_the_equations",
        "teachers/encoders/test_wav2vec.py::test_the_stack_is_the_library_s_where_nothing_is_resampled",
        "teachers/encoders/test_wav2vec.py::test_the_audio_pack_of_a_clip_equals_the_equations",
        "teachers/encoders/test_wav2vec.py::test_the_reference_frame_may_have_a_row_of_zeros",
        "teachers/encoders/test_wav2vec_folder.py::test_a_published_folder_loads_frozen_in_fp32",
        "students/serving/test_session.py::test_an_impulse_lands_on_its_frame_at_any_time",
    )),
    (14, "4 F - 3 rows of (4 F - 4) / fps seconds: audio stretched in time", (
        "teachers/encoders/test_wav2vec.py::test_a_whole_clip_equals_the_equations",
        "students/serving/test_session.py::test_an_impulse_lands_on_its_frame_at_any_time",
    )),
    (15, "audio enters before blocks 2 .. L/2, projection i - 2", (
        "teachers/networks/test_wan.py::test_audio_enters_where_the_published_rule_says",
        "teachers/test_reference_wan.py::test_audio_is_added_before_the_chosen_blocks_alone",
        "teachers/test_reference_wan.py::test_network_and_teacher_are_the_equations",
    )),
    (16, "wav2vec sees the whole clip, and a latent frame its own last pixel frame", (
        "teachers/encoders/test_wav2vec.py::test_any_split_gives_the_same_bits",
        "teachers/encoders/test_wav2vec.py::test_rows_see_their_own_window_and_no_other_sample",
        "students/serving/test_session.py::test_the_future_is_not_heard_and_the_margin_is",
    )),
    (17, "1 + 4 k frames: the first latent of a stream is one frame, caches live on between chunks", (
        "teachers/codecs/test_wan_vae.py::test_chunks_equal_the_whole",
        "teachers/codecs/test_wan_vae.py::test_encoding_is_causal_and_takes_an_image",
        "teachers/codecs/test_taehv.py::test_chunks_equal_the_whole",
        "students/serving/test_session.py::test_the_training_rollout_is_the_stream_bit_for_bit",
    )),
    (18, "a tiled VAE shifts the colours", (
        "distill/methods/test_trap_cases.py::test_the_library_s_tiling_never_reaches_the_codec",
    )),
    (19, "RMSNorm over the full width, 44 + 42 + 42 rotations, sinusoids and modulation in high precision", (
        "teachers/test_reference_wan.py::test_network_and_teacher_are_the_equations",
        "distill/methods/test_trap_cases.py::test_rotations_are_those_of_fp64_at_far_positions",
        "distill/methods/test_trap_cases.py::test_a_bf16_network_norms_and_modulates_in_fp32",
        "students/serving/test_optimize.py::test_bf16_keeps_norms_and_time_in_fp32_and_stays_near",
    )),
    (20, "keys cached at absolute positions: the sinks drift away, the table ends", (
        "students/test_student.py::test_a_stream_has_no_last_position",
        "students/test_history.py::test_the_cache_holds_what_training_concatenates",
        "teachers/networks/test_wan.py::test_positions_past_the_table_are_refused",
    )),
    (21, "only the clean pass lasts in the cache, it rolls once a chunk and holds sinks and window", (
        "students/test_student.py::test_one_masked_pass_equals_the_cached_stream",
        "students/test_student.py::test_a_commit_leaves_its_state_alone",
        "students/test_history.py::test_slots_fill_without_a_gap_and_a_chunk_keeps_its_place",
        "students/test_history.py::test_the_cache_holds_what_training_concatenates",
    )),
    (22, "a chunk sees itself both ways and all chunks before it", (
        "distill/methods/test_trap_cases.py::test_the_frames_of_a_chunk_see_each_other_both_ways",
        "students/test_student.py::test_no_chunk_sees_what_comes_after_it",
    )),
    (23, "padding rows of flex attention", "Nothing is padded: attention runs over whole chunks that are cut out by slices."),
    (24, "masked pass and cache agree only with a clean past in both", (
        "students/test_student.py::test_one_masked_pass_equals_the_cached_stream",
        "students/test_history.py::test_same_level_is_diffusion_forcing_at_one_sigma",
        "distill/methods/test_methods.py::test_ode_init_gives_each_chunk_the_state_of_its_sigma",
        "students/serving/test_session.py::test_the_training_rollout_is_the_stream_bit_for_bit",
    )),
    (25, "gradient through the cache into earlier chunks", (
        "students/test_student.py::test_a_chunk_s_gradient_stays_in_its_exit_step",
    )),
    (26, "text keys cached by a step without gradient: the text layers do not learn", (
        "students/test_student.py::test_every_weight_learns_from_a_rollout",
    )),
    (27, "a rolling cache under checkpointing: the recomputation sees another context", (
        "distill/methods/test_trap_cases.py::test_an_evicting_context_gives_the_same_gradients_under_checkpointing",
    )),
    (28, "eval mode turns checkpointing off", (
        "distill/methods/test_trap_cases.py::test_checkpointing_recomputes_whatever_the_mode",
    )),
    (29, "exit steps that differ between ranks", (
        "students/test_student.py::test_ranks_draw_different_noise_and_the_same_exit_step",
        "distill/methods/test_methods.py::test_dmd_draws_its_exit_step_from_the_shared_generator",
    )),
    (30, "600 iterations are 120 updates of the student", (
        "distill/methods/test_methods.py::test_the_cadence_of_dmd",
    )),
    (31, "the student moves before the fake score was trained, which starts as a bidirectional teacher", (
        "distill/methods/test_methods.py::test_the_cadence_of_dmd",
    )),
    (32, "velocity rebuilt from an x0 in bf16", (
        "distill/methods/test_trap_cases.py::test_the_velocity_survives_x0_at_small_sigma",
        "distill/methods/test_losses.py::test_power_two_is_the_velocity_loss",
        "teachers/test_flow.py::test_differences_are_taken_in_fp32",
    )),
    (33, "a pseudo-target in bf16 swallows the gradient", (
        "distill/methods/test_trap_cases.py::test_a_small_dmd_gradient_survives_a_bf16_x0",
        "distill/methods/test_losses.py::test_the_dmd_gradient_is_eq_7_and_8",
    )),
    (34, "the normaliser: one a sample, and it goes to 0", (
        "distill/methods/test_losses.py::test_the_dmd_gradient_is_eq_7_and_8",
        "distill/methods/test_trap_cases.py::test_a_perfect_student_has_a_finite_gradient",
    )),
    (35, "the average steps with the student alone; its keys carry FSDP's prefixes", (
        "distill/training/test_loop.py::test_the_average_steps_with_its_role_only",
        "distill/training/test_loop.py::test_the_average_has_its_closed_form",
        "teachers/checkpoints/test_convert.py::test_averaged_weights_of_fsdp_lose_their_prefixes_and_come_first",
    )),
    (36, "the global batch of 64 is part of the recipe", (
        "distill/training/test_loop.py::test_two_batches_of_four_are_one_of_eight",
        "distill/training/test_loop.py::test_two_ranks_are_one_of_twice_the_batch",
    )),
    (37, "betas 0, 0.999 for DMD and 0.9, 0.999 for the ODE stage", (
        "distill/methods/test_trap_cases.py::test_the_published_recipes_have_the_published_grid_and_betas",
    )),
    (38, "latents stored in bf16 lose 3 bits against fp16", (
        "distill/pipeline/test_trajectories.py::test_a_round_trip",
    )),
    (39, "two negative prompts in two stages", (
        "distill/methods/test_trap_cases.py::test_trajectories_and_dmd_have_one_unconditional_branch",
    )),
    (40, "resize_pad crops", (
        "teachers/media/test_picture.py::test_fit_crops_first_and_scales_without_aliasing",
    )),
    (41, "a teacher asked for sizes and frame rates that it was not trained at",
        "Size and frame rate are data of the recipe, whose header says where they leave the teacher's; weights do not tell them."),
    (42, "noise that is kept from step to step", (
        "students/test_student.py::test_noise_is_fresh_for_every_chunk_and_step",
        "students/test_student.py::test_the_sampler_renoises_to_the_next_sigma",
        "students/serving/test_session.py::test_noise_is_a_function_of_seed_chunk_and_step",
    )),
]
# fmt: on


def functions_of(file: Path) -> dict[str, str]:
    """Every test function of a file, parametrised or not, and its decorators' text."""
    functions = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)]
    return {
        function.name: " ".join(ast.unparse(decorator) for decorator in function.decorator_list)
        for function in functions
        if function.name.startswith("test_")
    }


def test_every_trap_is_listed_once():
    assert [number for number, _, _ in TRAPS] == list(range(1, 43))


@pytest.mark.parametrize(("number", "words", "held"), TRAPS, ids=[str(number) for number, _, _ in TRAPS])
def test_what_holds_a_trap_is_there(number, words, held):
    """Each named test exists and runs with the quick ones; without a test there is a sentence."""
    assert words
    if isinstance(held, str):
        assert re.fullmatch(r"[A-Z].{30,}\.", held)
        return
    assert held
    assert len(set(held)) == len(held)
    for node in held:
        file, _, name = node.partition("::")
        found = functions_of(Path(__file__).resolve().parents[2] / file)
        assert name in found, f"trap {number}: {file} has no {name}"
        assert not re.search(r"mark\.(slow|gpu|skip|xfail)", found[name]), f"trap {number}: {node} does not always run"
