"""Each test of Sentry's taskbroker has a line: the test that shows the behaviour here, or the reason why it can't
apply.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Final

import pytest

HERE: Final = Path(__file__).parent
ON_ITS_WAY: Final = "activations held by a server are in flight; the age is that of waiting ones"
NO_BUCKETS: Final = "claims split spans and skip rows locked by others, so there are no buckets"
PUSH_MODE: Final = "get_task_push_mode_returns_permission_denied"
TWO_STREAMS: Final = "two_concurrent_streams_of_the_same_activations_store_each_once"
KAFKA: Final = "no queue belongs to a server: any server claims from any queue, so there are no partitions to own"
SAME_TRANSACTION: Final = "a retry is appended in the transaction that ends its attempt, so no state lies between"
NO_VACUUM: Final = (
    "rows are not deleted one by one: batches are deleted whole, in steps, and the database reuses their pages"
)
PROBES: Final = "only the taskbroker's own tests empty or probe its database this way"
PATIENCE: Final = "`retry_transient` and the flusher retry an unavailable store, for every database"


def counterpart_in(module: str, test: str) -> tuple[str, str]:
    package, _, name = module.rpartition(".")
    return f"tests.grpc.{package or 'taskbroker'}.test_{name}", f"test_{test}"


STATUSES: Final = counterpart_in("consumer_service", "set_task_status_invalid")
OVERDUE: Final = counterpart_in("dispatching", "r6_a_fenced_report_after_the_deadline_changes_nothing")
TOO_OFTEN: Final = counterpart_in(
    "dispatching", "a_run_past_its_deadline_too_often_fails_and_becomes_a_dead_letter_if_requested"
)
ONCE: Final = counterpart_in("dispatching", "an_at_most_once_run_fails_at_its_deadline")
NO_RETRY_STATE: Final = counterpart_in("taskbroker_behaviours", "a_missed_deadline_does_not_depend_on_the_retry_state")
LAPSED: Final = counterpart_in("taskbroker_behaviours", "a_lapsed_claim_releases_its_run_with_counts_unchanged")
PRUNED: Final = counterpart_in("taskbroker_behaviours", "finished_activations_are_deleted_with_their_batch")
DEPTHS: Final = counterpart_in("taskbroker_behaviours", "depths_are_the_counts_of_the_states")
AGE: Final = counterpart_in("taskbroker_behaviours", "the_age_is_that_of_the_oldest_waiting_activation")
CLAIMS: Final = counterpart_in("taskbroker_behaviours", "a_claim_returns_at_most_the_requested_number")
EXPIRED: Final = counterpart_in("dispatching", "expired_activations_are_not_delivered_even_when_already_buffered")
KILLED: Final = counterpart_in(
    "activation_intake", "activations_of_a_killed_task_are_dropped_at_intake_and_when_buffered"
)
DEAD: Final = counterpart_in("consumer_service", "a_failure_becomes_a_dead_letter_if_the_activation_requests_it")
STREAM: Final = counterpart_in(
    "activation_intake", "a_stream_stores_each_id_once_and_refuses_invalid_activations_alone"
)
CARRIED: Final = counterpart_in("consumer_service", "a_retry_can_change_max_attempts_and_delay_for_all_later_attempts")
APPLICATION: Final = counterpart_in("consumer_service", "get_task_with_application_success")
NAMESPACE: Final = counterpart_in(
    "consumer_service", "get_task_with_namespace_and_application_returns_only_matching_tasks"
)
NEEDED: Final = counterpart_in("consumer_service", "get_task_with_namespace_requires_application")
MIXED: Final = counterpart_in("consumer_service", "set_batch_activation_status_mixed")
PASS: Final = counterpart_in("taskbroker_behaviours", "a_tick_and_a_sweep_end_overdue_and_expired_activations")
SILENT: Final = counterpart_in("dispatching", "runs_of_a_lapsed_server_are_delivered_again_after_the_grace")
PUSHED: Final = counterpart_in("taskbroker_behaviours", "pushed_activations_are_marked_on_first_and_later_attempts")
NOT_PUSHED: Final = counterpart_in("taskbroker_behaviours", "an_activation_that_could_not_be_pushed_waits_unmarked")
SIGNED: Final = counterpart_in("transport.signing", "a_signed_call_is_accepted")
UNSIGNED: Final = counterpart_in("transport.signing", "an_unsigned_call_never_reaches_its_handler")
VECTOR: Final = counterpart_in("transport.signing", "the_signature_matches_the_contract_s_test_vector")

TABLE: Final[dict[str, tuple[str, str] | str]] = {
    "test_activation_status_is_completion": STATUSES,
    "test_activation_status_from": STATUSES,
    "test_sqlite_create_db": counterpart_in("taskbroker_behaviours", "opening_creates_the_database_file"),
    "test_store": counterpart_in("taskbroker_behaviours", "two_activations_are_two_runs"),
    "test_count_depths": DEPTHS,
    "test_count_depths_per_partition_postgres": KAFKA,
    "test_multi_topic_partition_scoping_postgres": KAFKA,
    "test_age_based_drain_claims_orphan_postgres": KAFKA,
    "test_age_based_drain_upkeep_postgres": KAFKA,
    "test_store_duplicate_id_in_batch": STREAM,
    "test_store_duplicate_id_between_batches": STREAM,
    "test_get_pending_activation": counterpart_in(
        "taskbroker_behaviours", "the_oldest_is_delivered_first_and_has_its_deadline_plus_the_grace"
    ),
    "test_get_pending_activation_bucket_filter": NO_BUCKETS,
    "test_get_pending_activation_with_race": counterpart_in(
        "taskbroker_behaviours", "two_thousand_claims_at_once_get_two_thousand_ids"
    ),
    "test_get_pending_activation_with_namespace": NAMESPACE,
    "test_get_pending_activation_from_multiple_namespaces": counterpart_in(
        "taskbroker_behaviours", "several_namespaces_are_delivered_in_order_of_arrival"
    ),
    "test_get_pending_activation_with_namespace_requires_application": NEEDED,
    "test_get_pending_activation_skip_expires": EXPIRED,
    "test_get_pending_activation_earliest": counterpart_in("dispatching", "a_queue_is_delivered_in_order_of_arrival"),
    "test_get_pending_activation_fetches_application": counterpart_in("consumer_service", "get_task_success"),
    "test_get_pending_activation_with_application": APPLICATION,
    "test_get_pending_activation_with_application_and_namespace": NAMESPACE,
    "test_get_pending_activations_no_limit": CLAIMS,
    "test_get_pending_activations_limit_below_pending": CLAIMS,
    "test_get_pending_activations_limit_above_pending": CLAIMS,
    "test_count_pending_activations": DEPTHS,
    "test_set_activation_status": counterpart_in("consumer_service", "set_task_status"),
    "test_set_activation_status_with_partitions": KAFKA,
    "test_set_processing_deadline": counterpart_in(
        "dispatching", "the_deadline_is_that_of_the_activation_plus_the_grace"
    ),
    "test_delete_activation": MIXED,
    "test_get_retry_activations": SAME_TRANSACTION,
    "test_handle_processing_deadline": OVERDUE,
    "test_handle_processing_deadline_multiple_tasks": OVERDUE,
    "test_handle_processing_at_most_once": ONCE,
    "test_handle_processing_deadline_discard_after": NO_RETRY_STATE,
    "test_handle_processing_deadline_deadletter_after": NO_RETRY_STATE,
    "test_handle_processing_deadline_no_retries_remaining": NO_RETRY_STATE,
    "test_handle_claim_expiration_unsent_no_attempt_increment": LAPSED,
    "test_handle_claim_expiration_at_most_once_reverts_to_pending": LAPSED,
    "test_processing_attempts_exceeded": TOO_OFTEN,
    "test_remove_completed": PRUNED,
    "test_remove_completed_multiple_gaps": PRUNED,
    "test_handle_failed_tasks": DEAD,
    "test_mark_completed": counterpart_in("consumer_service", "set_batch_activation_status_success"),
    "test_handle_expires_at": EXPIRED,
    "test_remove_killswitched": KILLED,
    "test_clear": PROBES,
    "test_full_vacuum": NO_VACUUM,
    "test_vacuum_db_no_limit": NO_VACUUM,
    "test_vacuum_db_incremental": NO_VACUUM,
    "test_db_size": (
        "tests.store.test_conformance_activations",
        "test_the_size_of_a_store_grows_with_its_content",
    ),
    "test_pending_activation_max_lag_no_pending": AGE,
    "test_pending_activation_max_lag_use_oldest": AGE,
    "test_pending_activation_max_lag_use_oldest_with_claimed": ON_ITS_WAY,
    "test_pending_activation_max_lag_ignore_processing_attempts": AGE,
    "test_pending_activation_max_lag_account_for_delayed": AGE,
    "test_db_status_calls_ok": PROBES,
    "test_migrations": (
        "tests.store.test_schema_migration",
        "test_older_processes_continue_while_a_newer_one_migrates",
    ),
    "retry: until success": PATIENCE,
    "retry: exhaustion surfaces": counterpart_in(
        "dispatching", "a_claim_waits_for_an_unavailable_store_only_for_a_bounded_time"
    ),
    "retry: non-retryable once": PATIENCE,
    "retry: mixed stops": PATIENCE,
    "retry: zero retries": PATIENCE,
    "retry: first try": PATIENCE,
    "retry: classification": PATIENCE,
    "test_get_task_push_mode_returns_permission_denied": counterpart_in("consumer_service", PUSH_MODE),
    "test_get_task": counterpart_in("consumer_service", "get_task"),
    "test_set_task_status": counterpart_in("consumer_service", "set_task_status"),
    "test_set_task_status_invalid": STATUSES,
    "test_get_task_success": counterpart_in("consumer_service", "get_task_success"),
    "test_get_task_with_application_success": APPLICATION,
    "test_get_task_with_namespace_requires_application": NEEDED,
    "test_set_task_status_success": counterpart_in("consumer_service", "set_task_status_success"),
    "test_set_task_status_with_application": counterpart_in("consumer_service", "set_task_status_with_application"),
    "test_set_task_status_with_application_no_match": counterpart_in(
        "consumer_service", "set_task_status_with_application_no_match"
    ),
    "test_set_task_status_with_namespace_requires_application": counterpart_in(
        "consumer_service", "set_task_status_with_namespace_requires_application"
    ),
    "test_set_task_status_forwards_to_update_channel": counterpart_in(
        "taskbroker_behaviours", "a_batched_report_is_accepted_and_written_with_others"
    ),
    "test_set_task_status_update_channel_closed_returns_internal": counterpart_in(
        "taskbroker_behaviours", "a_report_to_a_stopped_server_is_answered_with_internal"
    ),
    "test_set_batch_activation_status_success": counterpart_in(
        "consumer_service", "set_batch_activation_status_success"
    ),
    "test_set_batch_activation_status_empty": counterpart_in("consumer_service", "set_batch_activation_status_empty"),
    "test_set_batch_activation_status_invalid_status": counterpart_in(
        "consumer_service", "set_batch_activation_status_invalid_status"
    ),
    "test_set_batch_activation_status_retry": counterpart_in("consumer_service", "set_batch_activation_status_retry"),
    "test_set_batch_activation_status_mixed": MIXED,
    "auth: no secret passes": counterpart_in(
        "transport.signing", "without_a_secret_all_calls_are_accepted_as_unsigned"
    ),
    "auth: missing signature fails": UNSIGNED,
    "auth: empty signature fails": UNSIGNED,
    "auth: garbage signature fails": UNSIGNED,
    "auth: health exempt": counterpart_in("transport.signing", "an_open_method_needs_no_signature"),
    "auth: path mismatch fails": counterpart_in(
        "transport.signing", "a_signature_is_valid_for_one_path_and_one_message"
    ),
    "auth: 5-byte header trimmed": VECTOR,
    "auth: secondary key passes": SIGNED,
    "auth: middleware ok": SIGNED,
    "auth: middleware UNAUTHENTICATED": UNSIGNED,
    "push_pool_start_marks_activation_processing_on_first_attempt": PUSHED,
    "push_pool_start_marks_activation_processing_on_retry": PUSHED,
    "push_pool_start_does_not_mark_activation_processing_on_push_failure": NOT_PUSHED,
    "fetch_pool_fetch_and_enqueue": CLAIMS,
    "fetch_pool_store_error": counterpart_in(
        "dispatching", "a_claim_waits_for_an_unavailable_store_only_for_a_bounded_time"
    ),
    "fetch_pool_no_pending": NOT_PUSHED,
    "worker_push_task: ok": counterpart_in("pusher", "a_delivered_activation_is_marked_once"),
    "worker_push_task: invalid payload": counterpart_in(
        "consumer_service", "a_run_of_the_activation_task_without_a_valid_payload_fails_alone"
    ),
    "worker_push_task: client error propagates": counterpart_in("pusher", "a_push_that_fails_marks_nothing"),
    "worker: HMAC vector": VECTOR,
    "retry activation: delay set": CARRIED,
    "retry activation: delay updated": CARRIED,
    "retry activation: delay cleared": CARRIED,
    "test_retry_activation_is_appended_to_kafka": CARRIED,
    "test_processing_deadline_retains_future_deadline": OVERDUE,
    "test_processing_deadline_skip_past_deadline_after_startup": SILENT,
    "test_processing_deadline_updates_past_deadline": OVERDUE,
    "test_processing_deadline_discard_at_most_once": ONCE,
    "test_processing_attempts_exceeded_discard": PASS,
    "test_remove_at_remove_failed_publish_to_kafka": DEAD,
    "test_remove_failed_discard": PASS,
    "test_expired_discard": PASS,
    "test_delay_elapsed": counterpart_in(
        "taskbroker_behaviours", "an_elapsed_delay_makes_exactly_the_due_activations_claimable"
    ),
    "test_forward_demoted_namespaces": counterpart_in(
        "activation_intake", "new_and_waiting_activations_of_a_demoted_queue_move_to_another"
    ),
    "upkeep: test_remove_killswitched": KILLED,
    "upkeep: test_remove_killswitched_selectors": counterpart_in(
        "activation_intake", "a_killswitch_on_an_argument_drops_only_matching_activations"
    ),
    "test_full_vacuum_on_upkeep": NO_VACUUM,
    "test_tasks_written_once_during_rebalancing": counterpart_in("activation_intake", TWO_STREAMS),
    "test_task_worker_processing": counterpart_in(
        "taskbroker_behaviours", "twenty_workers_complete_ten_thousand_tasks"
    ),
    "test_upkeep_retry": counterpart_in(
        "taskbroker_behaviours", "five_thousand_tasks_complete_after_three_retries_each"
    ),
    "test_failed_tasks": counterpart_in("taskbroker_behaviours", "half_of_ten_thousand_failures_become_dead_letters"),
    "test_upkeep_expiry": counterpart_in("taskbroker_behaviours", "ten_thousand_activations_expire"),
    "test_upkeep_delay": counterpart_in(
        "taskbroker_behaviours", "five_thousand_delayed_activations_are_delivered_when_due"
    ),
    "test_multi_topic_consumption": STREAM,
    "test_multi_topic_consumption_with_one_disabled": KAFKA,
    "test_push_postgres_happy_path": counterpart_in(
        "taskbroker_behaviours", "a_pusher_sends_each_once_and_each_is_processing"
    ),
    "test_push_postgres_failure_reverts_to_pending": counterpart_in(
        "taskbroker_behaviours", "workers_that_refuse_everything_lose_nothing"
    ),
    "test_push_postgres_upkeep_reverts_expired_claims": counterpart_in(
        "taskbroker_behaviours", "claims_of_a_hanging_worker_lapse_and_nothing_is_lost"
    ),
}


def test_every_test_of_the_taskbroker_has_one_line_in_the_table() -> None:
    loops = (HERE / "taskbroker_behaviours.txt").read_text(encoding="utf-8").splitlines()
    names = [line for line in loops if line and not line.startswith("#")]
    assert len(names) == len(set(names))
    assert [name for name in names if name not in TABLE] == []
    assert [name for name in TABLE if name not in names] == []


@pytest.mark.parametrize("name", [name for name, counterpart in TABLE.items() if isinstance(counterpart, tuple)])
def test_every_line_of_the_table_names_an_existing_test(name: str) -> None:
    counterpart = TABLE[name]
    assert isinstance(counterpart, tuple)
    module, test = counterpart
    loaded = importlib.import_module(module)
    assert callable(getattr(loaded, test)), test


def test_every_test_without_a_counterpart_has_a_reason() -> None:
    reasons = [counterpart for counterpart in TABLE.values() if isinstance(counterpart, str)]
    assert all(len(reason.split()) > 5 for reason in reasons)
