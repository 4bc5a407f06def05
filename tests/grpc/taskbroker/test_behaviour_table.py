"""Each behaviour that the reference tests has a line: the test that shows it here, or why it can't apply."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Final

import pytest

HERE: Final = Path(__file__).parent
ON_ITS_WAY: Final = "what a server holds is on its way out; the age is of what waits"
NO_BUCKETS: Final = "claims split spans and pass over what others lock: no buckets part them"
PUSH_MODE: Final = "get_task_push_mode_returns_permission_denied"
TWO_STREAMS: Final = "two_streams_of_the_same_activations_at_once_keep_each_once"
KAFKA: Final = "no queue belongs to a server: any server claims from any, so there are no partitions to own"
SAME_TRANSACTION: Final = "a retry is appended in the transaction that ends its attempt: no state lies between"
NO_VACUUM: Final = "no row is deleted by itself: batches go whole, in steps, and the database uses their pages again"
PROBES: Final = "a way to empty or probe the database that only its tests use"
PATIENCE: Final = "a store that does not answer is asked again by `patiently` and by the flusher, whatever the database"


def here(module: str, test: str) -> tuple[str, str]:
    package, _, name = module.rpartition(".")
    return f"tests.grpc.{package or 'taskbroker'}.test_{name}", f"test_{test}"


STATUSES: Final = here("consumer_service", "set_task_status_invalid")
OVERDUE: Final = here(
    "dispatching", "r6_a_worker_that_is_not_heard_of_in_time_loses_its_run_and_its_report_changes_nothing"
)
TOO_OFTEN: Final = here("dispatching", "a_run_that_was_overdue_too_often_fails_and_is_a_dead_letter_where_it_says_so")
ONCE: Final = here("dispatching", "a_run_that_may_run_once_fails_at_its_deadline")
NO_RETRY_STATE: Final = here("taskbroker_behaviours", "a_deadline_asks_no_retry_state")
LAPSED: Final = here("taskbroker_behaviours", "a_claim_that_lapses_returns_its_run_with_its_counts_unchanged")
PRUNED: Final = here("taskbroker_behaviours", "what_has_ended_goes_with_its_batch_wherever_it_sits")
DEPTHS: Final = here("taskbroker_behaviours", "depths_are_what_stands_in_the_states")
AGE: Final = here("taskbroker_behaviours", "the_age_of_the_oldest_that_waits")
CLAIMS: Final = here("taskbroker_behaviours", "of_what_waits_as_many_are_claimed_as_are_asked_for")
EXPIRED: Final = here("dispatching", "what_expired_is_not_handed_out_nor_what_expires_in_line")
KILLED: Final = here("activation_intake", "a_task_that_is_switched_off_is_dropped_at_the_door_and_in_line")
DEAD: Final = here("consumer_service", "a_failure_is_a_dead_letter_where_the_activation_says_so")
STREAM: Final = here("activation_intake", "a_stream_is_kept_each_once_by_its_id_and_what_is_wrong_is_refused_alone")
CARRIED: Final = here("consumer_service", "a_retry_carries_new_attempts_and_a_delay_and_both_last")
APPLICATION: Final = here("consumer_service", "get_task_with_application_success")
NAMESPACE: Final = here("consumer_service", "get_task_with_namespace_and_application_takes_only_theirs")
NEEDED: Final = here("consumer_service", "get_task_with_namespace_requires_application")
MIXED: Final = here("consumer_service", "set_batch_activation_status_mixed")
PASS: Final = here("taskbroker_behaviours", "a_pass_of_all_that_ends_without_a_worker_s_word")
SILENT: Final = here("dispatching", "what_workers_have_of_a_silent_server_is_handed_out_anew_after_a_grace")
PUSHED: Final = here("taskbroker_behaviours", "what_is_pushed_is_marked_on_its_first_attempt_and_on_a_later_one")
NOT_PUSHED: Final = here("taskbroker_behaviours", "what_could_not_be_pushed_waits_again_and_is_marked_by_nobody")
SIGNED: Final = here("transport.signing", "a_signed_call_is_answered")
UNSIGNED: Final = here("transport.signing", "a_call_that_is_not_signed_never_reaches_its_handler")
VECTOR: Final = here("transport.signing", "the_signature_is_that_of_the_contract")

TABLE: Final[dict[str, tuple[str, str] | str]] = {
    "test_activation_status_is_completion": STATUSES,
    "test_activation_status_from": STATUSES,
    "test_sqlite_create_db": here("taskbroker_behaviours", "opening_makes_the_file"),
    "test_store": here("taskbroker_behaviours", "two_activations_are_two_runs"),
    "test_count_depths": DEPTHS,
    "test_count_depths_per_partition_postgres": KAFKA,
    "test_multi_topic_partition_scoping_postgres": KAFKA,
    "test_age_based_drain_claims_orphan_postgres": KAFKA,
    "test_age_based_drain_upkeep_postgres": KAFKA,
    "test_store_duplicate_id_in_batch": STREAM,
    "test_store_duplicate_id_between_batches": STREAM,
    "test_get_pending_activation": here(
        "taskbroker_behaviours", "the_oldest_goes_first_and_has_until_its_deadline_and_grace"
    ),
    "test_get_pending_activation_bucket_filter": NO_BUCKETS,
    "test_get_pending_activation_with_race": here(
        "taskbroker_behaviours", "two_thousand_claims_at_once_get_two_thousand_ids"
    ),
    "test_get_pending_activation_with_namespace": NAMESPACE,
    "test_get_pending_activation_from_multiple_namespaces": here(
        "taskbroker_behaviours", "several_namespaces_at_once_in_the_order_they_came"
    ),
    "test_get_pending_activation_with_namespace_requires_application": NEEDED,
    "test_get_pending_activation_skip_expires": EXPIRED,
    "test_get_pending_activation_earliest": here("dispatching", "a_queue_is_handed_out_in_the_order_it_came"),
    "test_get_pending_activation_fetches_application": here("consumer_service", "get_task_success"),
    "test_get_pending_activation_with_application": APPLICATION,
    "test_get_pending_activation_with_application_and_namespace": NAMESPACE,
    "test_get_pending_activations_no_limit": CLAIMS,
    "test_get_pending_activations_limit_below_pending": CLAIMS,
    "test_get_pending_activations_limit_above_pending": CLAIMS,
    "test_count_pending_activations": DEPTHS,
    "test_set_activation_status": here("consumer_service", "set_task_status"),
    "test_set_activation_status_with_partitions": KAFKA,
    "test_set_processing_deadline": here("dispatching", "a_deadline_is_what_the_activation_says_and_the_grace"),
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
    "test_mark_completed": here("consumer_service", "set_batch_activation_status_success"),
    "test_handle_expires_at": EXPIRED,
    "test_remove_killswitched": KILLED,
    "test_clear": PROBES,
    "test_full_vacuum": NO_VACUUM,
    "test_vacuum_db_no_limit": NO_VACUUM,
    "test_vacuum_db_incremental": NO_VACUUM,
    "test_db_size": (
        "tests.store.test_conformance_activations",
        "test_a_store_says_how_much_room_it_takes_and_more_takes_more",
    ),
    "test_pending_activation_max_lag_no_pending": AGE,
    "test_pending_activation_max_lag_use_oldest": AGE,
    "test_pending_activation_max_lag_use_oldest_with_claimed": ON_ITS_WAY,
    "test_pending_activation_max_lag_ignore_processing_attempts": AGE,
    "test_pending_activation_max_lag_account_for_delayed": AGE,
    "test_db_status_calls_ok": PROBES,
    "test_migrations": ("tests.store.test_schema_migration", "test_older_processes_work_on_while_a_newer_one_migrates"),
    "retry: until success": PATIENCE,
    "retry: exhaustion surfaces": here(
        "dispatching", "a_store_that_does_not_answer_a_claim_is_waited_for_only_so_long"
    ),
    "retry: non-retryable once": PATIENCE,
    "retry: mixed stops": PATIENCE,
    "retry: zero retries": PATIENCE,
    "retry: first try": PATIENCE,
    "retry: classification": PATIENCE,
    "test_get_task_push_mode_returns_permission_denied": here("consumer_service", PUSH_MODE),
    "test_get_task": here("consumer_service", "get_task"),
    "test_set_task_status": here("consumer_service", "set_task_status"),
    "test_set_task_status_invalid": STATUSES,
    "test_get_task_success": here("consumer_service", "get_task_success"),
    "test_get_task_with_application_success": APPLICATION,
    "test_get_task_with_namespace_requires_application": NEEDED,
    "test_set_task_status_success": here("consumer_service", "set_task_status_success"),
    "test_set_task_status_with_application": here("consumer_service", "set_task_status_with_application"),
    "test_set_task_status_with_application_no_match": here(
        "consumer_service", "set_task_status_with_application_no_match"
    ),
    "test_set_task_status_with_namespace_requires_application": here(
        "consumer_service", "set_task_status_with_namespace_requires_application"
    ),
    "test_set_task_status_forwards_to_update_channel": here(
        "taskbroker_behaviours", "a_batched_report_is_taken_in_and_written_with_others"
    ),
    "test_set_task_status_update_channel_closed_returns_internal": here(
        "taskbroker_behaviours", "a_report_to_a_server_that_has_stopped_is_internal"
    ),
    "test_set_batch_activation_status_success": here("consumer_service", "set_batch_activation_status_success"),
    "test_set_batch_activation_status_empty": here("consumer_service", "set_batch_activation_status_empty"),
    "test_set_batch_activation_status_invalid_status": here(
        "consumer_service", "set_batch_activation_status_invalid_status"
    ),
    "test_set_batch_activation_status_retry": here("consumer_service", "set_batch_activation_status_retry"),
    "test_set_batch_activation_status_mixed": MIXED,
    "auth: no secret passes": here(
        "transport.signing", "without_a_secret_everybody_is_let_in_and_nobody_counts_as_signed"
    ),
    "auth: missing signature fails": UNSIGNED,
    "auth: empty signature fails": UNSIGNED,
    "auth: garbage signature fails": UNSIGNED,
    "auth: health exempt": here("transport.signing", "what_is_open_needs_no_signature"),
    "auth: path mismatch fails": here("transport.signing", "a_signature_holds_for_one_path_and_one_message"),
    "auth: 5-byte header trimmed": VECTOR,
    "auth: secondary key passes": SIGNED,
    "auth: middleware ok": SIGNED,
    "auth: middleware UNAUTHENTICATED": UNSIGNED,
    "push_pool_start_marks_activation_processing_on_first_attempt": PUSHED,
    "push_pool_start_marks_activation_processing_on_retry": PUSHED,
    "push_pool_start_does_not_mark_activation_processing_on_push_failure": NOT_PUSHED,
    "fetch_pool_fetch_and_enqueue": CLAIMS,
    "fetch_pool_store_error": here("dispatching", "a_store_that_does_not_answer_a_claim_is_waited_for_only_so_long"),
    "fetch_pool_no_pending": NOT_PUSHED,
    "worker_push_task: ok": here("pusher", "what_reaches_its_worker_is_marked_once"),
    "worker_push_task: invalid payload": here(
        "consumer_service", "what_another_door_let_into_the_lane_fails_and_holds_up_nobody"
    ),
    "worker_push_task: client error propagates": here("pusher", "a_push_that_fails_marks_nothing"),
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
    "test_delay_elapsed": here("taskbroker_behaviours", "a_delay_that_has_elapsed_lets_go_of_what_is_due_and_no_more"),
    "test_forward_demoted_namespaces": here(
        "activation_intake", "a_demoted_queue_s_activations_go_to_another_those_that_wait_too"
    ),
    "upkeep: test_remove_killswitched": KILLED,
    "upkeep: test_remove_killswitched_selectors": here(
        "activation_intake", "of_a_task_only_those_with_an_argument_are_dropped"
    ),
    "test_full_vacuum_on_upkeep": NO_VACUUM,
    "test_tasks_written_once_during_rebalancing": here("activation_intake", TWO_STREAMS),
    "test_task_worker_processing": here("taskbroker_behaviours", "ten_thousand_tasks_and_twenty_workers"),
    "test_upkeep_retry": here("taskbroker_behaviours", "five_thousand_tasks_with_three_retries_each"),
    "test_failed_tasks": here("taskbroker_behaviours", "ten_thousand_failures_of_which_half_are_dead_letters"),
    "test_upkeep_expiry": here("taskbroker_behaviours", "ten_thousand_that_expire"),
    "test_upkeep_delay": here("taskbroker_behaviours", "five_thousand_delayed_by_twenty_to_forty_seconds"),
    "test_multi_topic_consumption": STREAM,
    "test_multi_topic_consumption_with_one_disabled": KAFKA,
    "test_push_postgres_happy_path": here("taskbroker_behaviours", "a_pool_pushes_each_once_and_each_is_processing"),
    "test_push_postgres_failure_reverts_to_pending": here(
        "taskbroker_behaviours", "of_workers_that_refuse_everything_nothing_is_lost"
    ),
    "test_push_postgres_upkeep_reverts_expired_claims": here(
        "taskbroker_behaviours", "of_a_worker_that_hangs_claims_lapse_and_nothing_is_lost"
    ),
}


def test_every_name_of_the_reference_has_a_line_and_no_other() -> None:
    loops = (HERE / "taskbroker_behaviours.txt").read_text(encoding="utf-8").splitlines()
    names = [line for line in loops if line and not line.startswith("#")]
    assert len(names) == len(set(names))
    assert [name for name in names if name not in TABLE] == []
    assert [name for name in TABLE if name not in names] == []


@pytest.mark.parametrize("name", [name for name, shown in TABLE.items() if isinstance(shown, tuple)])
def test_a_line_names_a_test_that_there_is(name: str) -> None:
    shown = TABLE[name]
    assert isinstance(shown, tuple)
    module, test = shown
    found = importlib.import_module(module)
    assert callable(getattr(found, test)), test


def test_what_is_not_shown_says_why() -> None:
    reasons = [shown for shown in TABLE.values() if isinstance(shown, str)]
    assert all(len(reason.split()) > 5 for reason in reasons)
