"""The reference's test list, by name: each has its test here, or the reason why it can't apply.

The names are those of the reference's own tests and of the promises in its list (its section 5, and the origin of an event).
A name without an entry, an entry whose test is gone, and a reason that is empty fail.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Final

import pytest

HERE: Final = Path(__file__).parent
FOLDERS: Final = (HERE, HERE.parent / "core", HERE.parent / "journeys", HERE.parent / "cli")

CHAINS: Final = "there are no chains: sources are merged into one order, and one rollback takes all of them back"
NO_SEARCH: Final = "nothing searches for how deep a source went back: the source says Rewind(to)"
NO_TARGET: Final = "an indexer keeps no addresses, contracts or partitions that a rollback would have to find again"
NO_CLICKHOUSE: Final = "rows go into the store's own database and nowhere else"
NO_METADATA: Final = "there is no chain metadata beside the checkpoint: is_caught_up moves with the commit itself"
NO_PROM: Final = "progress is an object (Progress) and a bar; Prometheus metrics belong to the server's own page"

TABLE: Final[dict[str, str]] = {
    # 5.1 WriteRead
    "Test writing and reading entities with special cases": "test_every_type_of_value_comes_back_as_it_was_set",
    "63-char entity names get distinct history tables": "test_names_as_long_as_can_be_have_tables_histories_and_indexes_of_their_own",
    "Keeps committed entities across batches without rewriting their history": "test_a_row_that_is_only_read_stays_in_memory_and_gets_no_history",
    "untouched entity gets no second history row, updated one gets exactly one": "test_a_row_that_is_only_read_stays_in_memory_and_gets_no_history",
    "dropCommittedChanges keeps only uncommitted changes": "test_what_is_not_committed_never_leaves_memory",
    "dropCommittedChanges with keepLoadedFromDb spares db-loaded entries": "test_eviction_takes_the_oldest_committed_rows_and_no_more_than_it_must",
    "Test getWhere queries with eq and gt operators": "test_where_finds_what_a_walk_over_all_rows_finds",
    "getWhere on entities set in the same handler": "test_any_of_and_ranges_overlay_what_is_staged",
    "after delete in next batch the row leaves the index": "test_an_index_follows_every_change_of_its_rows",
    "getWhere throws a user friendly error for an invalid filter": "test_a_question_that_can_t_be_answered_says_how_to_ask",
    # 5.2 LoadLayer
    "Missing id: one IN query, None": "test_a_batch_of_unknown_rows_is_one_query_and_a_known_one_none",
    "two awaited gets: two queries": "test_gets_of_one_handler_at_once_are_one_query",
    "second get of same id: no query (negative cache)": "test_a_batch_of_unknown_rows_is_one_query_and_a_known_one_none",
    "calls separated by a timer don't stack": "test_gets_of_one_handler_at_once_are_one_query",
    "concurrent gets: one IN query": "test_gets_of_one_handler_at_once_are_one_query",
    "ids already in memory are not queried": "test_a_batch_of_unknown_rows_is_one_query_and_a_known_one_none",
    "id set during the in-flight load: memory version wins": "test_what_a_select_says_never_replaces_what_memory_knows",
    "batching is by microtask": "test_gets_of_one_handler_at_once_are_one_query",
    "Eq and Gt/Lt issue the right filter": "test_where_finds_what_a_walk_over_all_rows_finds",
    "concurrent Eq on one field merge to In": "test_questions_of_one_field_at_once_are_one_query_and_ranges_each_their_own",
    "rows of a merged query are distributed to the right filters": "test_questions_of_one_field_at_once_are_one_query_and_ranges_each_their_own",
    "In+In merge": "test_questions_of_one_field_at_once_are_one_query_and_ranges_each_their_own",
    "Gt not merged": "test_questions_of_one_field_at_once_are_one_query_and_ranges_each_their_own",
    "second call served from memory": "test_questions_of_one_field_at_once_are_one_query_and_ranges_each_their_own",
    "entity updated to no longer match leaves the index": "test_questions_of_one_field_at_once_are_one_query_and_ranges_each_their_own",
    "entity set after index creation joins it": "test_questions_of_one_field_at_once_are_one_query_and_ranges_each_their_own",
    "optional output None is not re-run": "test_an_answer_of_none_is_an_answer",
    "same input dedupes within a chain": "test_a_call_is_made_once_for_its_arguments_and_its_answer_outlives_the_process",
    "re-runs per chain for chain-scoped": f"- {CHAINS}",
    "shared for cross-chain": "test_a_call_is_made_once_for_its_arguments_and_its_answer_outlives_the_process",
    "rate limit independent per chain": f"- {CHAINS}",
    "budget survives rollback reset": "test_a_rate_limit_survives_going_back",
    # 5.3 Rollback
    "Should stay in reorg threshold on restart when progress is past threshold": "- history is kept or not, whatever the position: there is no threshold",
    "Should NOT be in reorg threshold when DB is only initialized": "- history is kept or not, whatever the position: there is no threshold",
    "Rollback of a single chain indexer": "test_rollback_to_any_event_equals_a_run_up_to_it",
    "same-checkpoint rewrites dedupe": "test_a_row_set_twice_by_one_event_is_one_row_of_history",
    "create+delete inside window": "test_a_rollback_restores_what_stood_and_may_be_followed_by_another",
    "after rollback tables, history and checkpoints hold only replayed data": "test_a_source_that_goes_back_takes_the_tables_with_it",
    "Rolls back SET -> DELETE -> SET to the deleted state": "test_a_rollback_restores_what_stood_and_may_be_followed_by_another",
    "Parks a reorg detected while a batch is still processing": "test_a_rewind_waits_for_the_batch_under_way",
    "Fires onRollbackCommit per affected chain after the rollback write": "- a rollback is durable when it returns: there is no later write to call back after",
    "Stores checkpoints inside of the reorg threshold for batches without items": "- every checkpoint is an event: what has no event needs none to go back to",
    "Shouldn't detect reorg for rollbacked block": f"- {NO_SEARCH}",
    "Single chain rollback should also work for multichain indexer when another chains are stale": "test_several_sources_merge_by_time_however_they_race",
    "Rollback Dynamic Contract": f"- {NO_TARGET}",
    "Rollback of multichain indexer (single entity id change)": "test_several_sources_merge_by_time_however_they_race",
    "Rollback of multichain indexer (single entity id change + another entity on non-reorg chain)": "test_several_sources_merge_by_time_however_they_race",
    "Double reorg should NOT cause negative event counter": "test_rollback_to_any_event_equals_a_run_up_to_it",
    "Multi-chain reorg, rollback, reorg loop": "test_a_source_that_goes_back_takes_the_tables_with_it",
    "Reorg-on-reorg restores ALL chains' counters": "test_several_sources_merge_by_time_however_they_race",
    "Should not enter infinite reorg loop when reorg chain has no events processed since target checkpoint": "test_a_rewind_to_where_it_stands_changes_nothing",
    "Should NOT have duplicate queries after rollback with chunked partitions": f"- {NO_TARGET}",
    "Should efficiently refetch only blocks after rollback target": "test_after_a_rewind_the_other_sources_are_read_on_from_where_they_stood",
    "Flushes in-flight batch write before computing rollback diffs (no silent data loss on non-reorg chain)": "test_a_rollback_waits_for_the_commit_that_is_frozen_half_way",
    "reverts an entity written after the rollback target": "test_a_rollback_restores_what_stood_and_may_be_followed_by_another",
    "keeps a history row per committed change": "test_a_row_deleted_in_flight_and_made_again_has_each_change_once",
    "restores the pre-target value": "test_a_rollback_restores_what_stood_and_may_be_followed_by_another",
    "resumes from what the previous indexer persisted": "test_a_failed_commit_ends_the_indexer_at_once_and_nothing_after_it_is_written",
    "one row per chain; each chain restored from own history": f"- {CHAINS}",
    "reads/deletes never touch another chain's same id": f"- {CHAINS}",
    "prune keeps each chain's anchor": "test_pruned_history_still_goes_back_to_its_floor_and_not_before",
    "chain keeps fetching after its in-flight response is dropped by a sibling rollback": "test_after_a_rewind_the_other_sources_are_read_on_from_where_they_stood",
    "RollbackClickHouseOnly": f"- {NO_CLICKHOUSE}",
    "RpcRollback": f"- {NO_SEARCH}",
    # 5.4 Writing and concurrency
    "Should not rewrite a history change already persisted by an in-flight write": "test_a_row_deleted_in_flight_and_made_again_has_each_change_once",
    "metadata folded into a queued batch write": f"- {NO_METADATA}",
    "standalone upsert when idle": f"- {NO_METADATA}",
    "unchanged metadata not rewritten": f"- {NO_METADATA}",
    "full snapshot on any change": f"- {NO_METADATA}",
    "PruneStaleHistory: at most 5 oldest first, written entities excluded": "- history is pruned inside the commit's own transaction: nothing races with it",
    "PruneStaleHistory: starved ones forced": "test_history_is_pruned_as_events_come_and_goes_back_as_far_as_was_asked",
    "PruneStaleHistory: rollback write, none concurrent": "- history is pruned inside the commit's own transaction: nothing races with it",
    "PruneStaleHistory: non-Postgres skipped": "test_pruned_history_still_goes_back_to_its_floor_and_not_before",
    "launch runs then is skipped once stopped": "test_stop_commits_what_was_handled_and_the_next_run_goes_on",
    "processing flag released when idle": "test_stop_commits_what_was_handled_and_the_next_run_goes_on",
    "second loop is a no-op": "test_a_second_run_beside_the_first_is_refused",
    "errorExit stops and reports once": "test_a_failed_commit_ends_the_indexer_at_once_and_nothing_after_it_is_written",
    "FinalizeBackfill: runs once when two paths reach the phase together": "test_deferred_indexes_are_built_when_first_asked_for_or_at_the_end",
    "Throttler (4 timing rules)": f"- {NO_METADATA}",
    "random events over many queues: ordering correct and none lost": "test_sources_in_any_pieces_merge_into_the_one_order",
    "applyBatchProgress does not clobber a fetch frontier advanced meanwhile": "test_sources_in_any_pieces_merge_into_the_one_order",
    "stall seconds accrue from first mark and stop on reorg": "test_depth_zero_awaits_each_commit_before_the_next_batch",
    "EffectState: clears the cache in place but keeps stats and the rate-limit window": "test_a_rate_limit_survives_going_back",
    # 5.5 E2E and neighbours
    "Shouldn't allow context access after hander is resolved": "test_a_context_refuses_what_comes_after_its_handler_and_the_indexer_stops",
    "Track effects in prom metrics": f"- {NO_PROM}",
    "restart reloads cache": "test_a_call_is_made_once_for_its_arguments_and_its_answer_outlives_the_process",
    "changed output schema invalidates one entry": "test_an_answer_that_no_longer_fits_is_asked_for_again",
    "context.log inside an effect handler": "- an effect is a plain function of its arguments: it logs as any function does",
    "Chain-scoped effects": f"- {CHAINS}",
    "Effect rate limiting across multiple windows": "test_calls_keep_to_their_limit_and_an_error_reaches_only_its_caller",
    "single call per window": "test_calls_keep_to_their_limit_and_an_error_reaches_only_its_caller",
    "Effect cache can be disabled per-call": "test_without_cache_a_call_is_made_again_in_each_batch",
    "Effect error in one call shouldn't cause other calls to fail": "test_calls_keep_to_their_limit_and_an_error_reaches_only_its_caller",
    "Correctly sets Prom metrics": f"- {NO_PROM}",
    "Prom readiness metrics are gated on the whole indexer": "test_deferred_indexes_are_built_when_first_asked_for_or_at_the_end",
    "Items from later chunk wait for earlier chunk to complete": "test_sources_in_any_pieces_merge_into_the_one_order",
    "Populates config addresses on init and preserves them across restart": f"- {NO_TARGET}",
    "getOrCreate creates / loads existing": "test_get_or_create_sets_what_it_makes_and_leaves_what_is_there",
    "getOrThrow ok / throws / custom message": "test_require_answers_what_is_there",
    "loader failure in preload ignored, second aborts": "test_running_ahead_writes_nothing_and_its_errors_are_not_looked_at",
    "set in preload invisible to that run": "test_running_ahead_writes_nothing_and_its_errors_are_not_looked_at",
    "several events in one batch": "test_a_batch_of_unknown_rows_is_one_query_and_a_known_one_none",
    "cached effect once per key": "test_a_call_is_made_once_for_its_arguments_and_its_answer_outlives_the_process",
    "handler and effect throws reach the caller": "test_a_handler_that_raises_stops_the_indexer_and_says_where",
    "mutation of returned entity leaves store intact": "test_what_a_handler_got_can_t_be_changed_under_the_others",
    "access while running throws": "- what a simulation shows is what is committed, at any moment: nothing needs to be refused",
    "empty chain: empty change set": "test_a_source_without_events_is_caught_up_at_once",
    "second process rejected": "test_a_second_process_hears_who_holds_the_indexer_or_waits",
    "overlapping range rejected": "test_positions_that_do_not_rise_are_refused_by_name",
    "indexes absent during backfill, committed with ready_at, kept across restart": "test_deferred_indexes_are_built_when_first_asked_for_or_at_the_end",
    "ready held until then; finalize once; waits for all chains": "test_deferred_indexes_are_built_when_first_asked_for_or_at_the_end",
    "getWhere builds its index mid-backfill and returns right rows": "test_deferred_indexes_are_built_when_first_asked_for_or_at_the_end",
    "PgIndexes and IndexManager: dedupe, serialise per table, retry, resync": "- an index is made with IF NOT EXISTS by the committer, which does one thing at a time and retries",
    "ResumeFinalize: a run that died after catching up still finalizes on resume": "test_what_died_between_its_last_event_and_its_indexes_builds_them_at_the_next_start",
    "Persistence: init vs resume, config-diff refusal messages": "test_a_changed_type_is_refused_with_the_difference",
    "PgStorage: exact SQL of every shape": "test_where_finds_what_a_walk_over_all_rows_finds",
    "EntityFilter: operator parsing, cross product, merge rules, error texts": "test_a_question_that_can_t_be_answered_says_how_to_ask",
    "restart() on the same DB": "test_a_run_that_crashes_at_every_commit_ends_where_a_quiet_one_does",
    # the origin of an event as its handlers see it
    "EventOrigin: a handler sees source, position, time and kind of its event": "test_several_sources_merge_by_time_however_they_race",
}  # fmt: skip


def names_of_tests() -> set[str]:
    """The names of all tests in the folders of this capability."""
    found = set()
    for folder in FOLDERS:
        for path in folder.glob("test_*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                    found.add(node.name)
    return found


THERE: Final = names_of_tests()


@pytest.mark.parametrize("name", TABLE)
def test_a_test_of_the_reference_has_its_like_here_or_a_reason(name: str) -> None:
    entry = TABLE[name]
    if entry.startswith("- "):
        assert len(entry.split()) > 5, "a reason says why"
    else:
        assert entry in THERE


def test_the_table_holds_every_name_of_the_list() -> None:
    listed = (HERE / "reference.txt").read_text(encoding="utf-8").splitlines()
    assert [name for name in listed if name and name not in TABLE] == []
    assert [name for name in TABLE if name not in listed] == []
