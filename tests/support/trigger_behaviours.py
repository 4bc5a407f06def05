"""The 44 behaviours of trigger.dev's stream tests and its 9 two-phase tests, and their counterparts here.

`shown by`: a test shows the same behaviour. `unreachable`: a promise excludes the state, and a test proves it. `to
come`: it needs parents that wait for their children, which are not implemented.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

Column = Literal["shown by", "unreachable", "to come"]
ONE_STORE: Final = "a batch completes exactly once, decided in the transaction of its last outcome or of its seal"
NO_PARTIAL: Final = "an item that can't run is a failed run, so no batch is partly failed"


class Behaviour(NamedTuple):
    """One line of the table. `number` is trigger.dev's, `test` a function of `test_trigger_behaviours.py`."""

    number: str
    name: str
    column: Column
    test: str
    promise: str = ""


def _shown(number: str, name: str, test: str) -> Behaviour:
    return Behaviour(number, name, "shown by", f"test_{test}")


def _unreachable(number: str, name: str, test: str, promise: str) -> Behaviour:
    return Behaviour(number, name, "unreachable", f"test_{test}", promise)


TABLE: Final = (
    _shown("1", "should seal batch successfully when no race condition", "should_seal_batch_successfully_when_no_race_condition"),
    _shown("2", "should return sealed=true when batch is already sealed and PROCESSING", "should_return_sealed_when_batch_is_already_sealed_and_processing"),
    _shown("3", "should return sealed=true when batch is COMPLETED before Phase 2 retry arrives", "should_return_sealed_when_batch_is_completed_before_phase_2_retry_arrives"),
    _shown("4", "should throw when batch is in ABORTED status", "should_throw_when_batch_is_in_aborted_status"),
    _shown("5", "should throw when batch is sealed but ABORTED", "should_throw_when_batch_is_sealed_but_aborted"),
    _unreachable("6", "should return sealed=true when batch is PARTIAL_FAILED", "a_batch_with_items_that_can_not_run_completes_and_answers_sealed_to_a_retry", NO_PARTIAL),
    _unreachable("7", "should return sealed=true when batch is PARTIAL_FAILED by callback before seal attempt", "a_batch_whose_items_all_failed_before_the_seal_is_completed_by_the_seal", NO_PARTIAL),
    _shown("8", "should return sealed=true when concurrent request already sealed the batch during seal attempt", "should_return_sealed_when_concurrent_request_already_sealed_the_batch_during_seal_attempt"),
    _unreachable("9", "should return sealed=true when batch is COMPLETED by BatchQueue before seal attempt", "a_batch_whose_runs_all_ended_before_the_seal_attempt_is_completed_by_it", ONE_STORE),
    _shown("10", "should throw error when race condition leaves batch in unexpected state", "should_throw_error_when_race_condition_leaves_batch_in_unexpected_state"),
    _shown("11", "should return sealed=false when item count does not match", "should_return_not_sealed_when_item_count_does_not_match"),
    _unreachable("12", "should return sealed=true when seal-failed race produces sealed=true + PENDING", "a_sealed_batch_is_never_pending_again", ONE_STORE),
    _shown("13", "should throw when count-mismatch race produces sealed=true + ABORTED", "should_throw_when_the_batch_is_aborted_while_its_items_come"),
    _unreachable("14", "should return sealed=true when batch is sealed=false + PENDING + processingCompletedAt set", "a_retry_after_all_runs_ended_unsealed_seals_the_batch", ONE_STORE),
    _unreachable("15", "should return sealed=true on count-mismatch when callback fired before our getEnqueuedCount", "received_items_are_counted_however_fast_they_run", ONE_STORE),
    _shown("16", "ingests a large batch with bounded concurrency and seals it", "ingests_a_large_batch_with_bounded_concurrency_and_seals_it"),
    _shown("17", "bounds in-flight item processing to the configured concurrency", "bounds_in_flight_item_processing_to_the_configured_concurrency"),
    _shown("18", "perf: higher ingest concurrency processes a batch proportionally faster", "bounds_in_flight_item_processing_to_the_configured_concurrency"),
    _shown("19", "deduplicates already-enqueued items during concurrent ingest", "deduplicates_already_enqueued_items_during_concurrent_ingest"),
    _shown("20", "rejects an oversized item whose index exceeds runCount", "rejects_an_oversized_item_whose_index_exceeds_run_count"),
    _shown("21", "should parse basic NDJSON correctly", "should_parse_basic_ndjson_correctly"),
    _shown("22", "should handle NDJSON without trailing newline", "should_handle_ndjson_without_trailing_newline"),
    _shown("23", "should handle escaped newlines in JSON string values", "should_handle_escaped_newlines_in_json_string_values"),
    _shown("24", "should skip empty lines", "should_skip_empty_lines"),
    _shown("25", "should handle chunks split mid-line", "should_handle_chunks_split_mid_line"),
    _shown("26", "should handle multibyte UTF-8 characters split across chunks", "should_handle_multibyte_characters_split_across_chunks"),
    _shown("27", "should handle multiple multibyte characters across chunks", "should_handle_multibyte_characters_split_across_chunks"),
    _shown("28", "should emit OversizedItemMarker for lines exceeding maxItemBytes", "should_emit_a_marker_for_lines_exceeding_the_limit"),
    _shown("29", "should emit OversizedItemMarker for unbounded accumulation without newlines", "should_emit_a_marker_for_unbounded_accumulation_without_newlines"),
    _shown("30", "should skip remaining bytes of oversized line arriving in subsequent chunks", "should_skip_remaining_bytes_of_oversized_line_arriving_in_subsequent_chunks"),
    _shown("31", "stamps an oversized marker's index by emit position when it can't be extracted", "stamps_an_oversized_marker_s_index_by_emit_position_when_it_can_t_be_extracted"),
    _shown("32", "should check byte size before decoding to prevent OOM", "should_check_byte_size_before_decoding"),
    _shown("33", "should handle final line in flush without trailing newline", "should_handle_final_line_in_flush_without_trailing_newline"),
    _shown("34", "should reject invalid JSON", "should_reject_invalid_json"),
    _shown("35", "should reject invalid UTF-8 sequences", "should_reject_invalid_utf_8_sequences"),
    _shown("36", "should handle many small chunks efficiently", "should_handle_many_small_chunks_efficiently"),
    _shown("37", "should handle multiple lines per chunk", "should_handle_multiple_lines_per_chunk"),
    _shown("38", "should handle empty stream", "should_handle_empty_stream"),
    _shown("39", "should pass normal items and emit markers for oversized items in the same stream", "should_pass_normal_items_and_emit_markers_for_oversized_items_in_the_same_stream"),
    _shown("40", "should handle stream with only whitespace", "should_handle_stream_with_only_whitespace"),
    _shown("41", "should extract index and task from JSON bytes", "should_extract_index_and_task_from_json_bytes"),
    _shown("42", "should return defaults for empty or malformed bytes", "should_return_defaults_for_malformed_bytes"),
    _shown("43", "should handle keys in any order", "should_handle_keys_in_any_order"),
    _shown("44", "should not match nested keys", "should_not_match_nested_keys"),
    _shown("two-phase 1", "initialize batch, stream items one by one, items get processed", "items_streamed_one_by_one_get_processed"),
    _shown("two-phase 2", "items with same index are deduplicated", "items_with_same_index_are_deduplicated"),
    Behaviour("two-phase 3", "parent blocking: parent is resumed when batch completes", "to come", ""),
    _shown("two-phase 4", "error if batch not initialized", "error_if_batch_not_initialized"),
    Behaviour("two-phase 5", "aborts an unsealed batch and resumes the parent with an error", "to come", ""),
    _shown("two-phase 6", "leaves a batch alone when the stream sealed it first", "leaves_a_batch_alone_when_the_stream_sealed_it_first"),
    _shown("two-phase 7", "is idempotent when it runs twice", "is_idempotent_when_it_runs_twice"),
    Behaviour("two-phase 8", "resumes the parent when a previous run aborted the batch but died before the waitpoint", "to come", ""),
    _shown("two-phase 9", "aborts a fire-and-forget batch without a waitpoint to resolve", "aborts_an_unsealed_batch_past_its_deadline"),
)  # fmt: skip
