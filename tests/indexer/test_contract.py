"""Counterparts of HyperIndex's tests, by name: each has its test here, or the reason why it does not apply.

The names are those of HyperIndex's tests and of the guarantees that they check, and the origin of an event. The test
fails for a name without an entry, an entry whose test no longer exists, and an empty reason.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Final

import pytest

HERE: Final = Path(__file__).parent
FOLDERS: Final = (HERE, HERE.parent / "core", HERE.parent / "journeys", HERE.parent / "cli")

CHAINS: Final = "sources are not chains: they are merged into a single order, and a rollback takes all of them back"
NO_SEARCH: Final = "the indexer does not search for the depth of a rewind: the source sends Rewind(to)"
NO_TARGET: Final = "an indexer stores no addresses, contracts or partitions that a rollback would have to find again"
NO_CLICKHOUSE: Final = "rows go into the database of the store and nowhere else"
NO_METADATA: Final = "no chain metadata is stored beside the checkpoint: is_caught_up is written by the commit"
NO_PROM: Final = "progress is an object (IndexerProgress) and a bar; the server exports the Prometheus metrics"

COUNTERPARTS: Final[dict[str, str]] = {
    # 5.1 WriteRead
    "Test writing and reading entities with special cases": "test_each_value_type_is_returned_as_it_was_set",
    "63-char entity names get distinct history tables": "test_names_of_maximum_length_get_distinct_tables_histories_and_indexes",
    "Keeps committed entities across batches without rewriting their history": "test_a_row_that_is_only_read_stays_in_memory_and_gets_no_history",
    "untouched entity gets no second history row, updated one gets exactly one": "test_a_row_that_is_only_read_stays_in_memory_and_gets_no_history",
    "dropCommittedChanges keeps only uncommitted changes": "test_what_is_not_committed_never_leaves_memory",
    "dropCommittedChanges with keepLoadedFromDb spares db-loaded entries": "test_eviction_takes_the_oldest_committed_rows_and_no_more_than_it_must",
    "Test getWhere queries with eq and gt operators": "test_where_returns_the_same_rows_as_a_scan_of_all_rows",
    "getWhere on entities set in the same handler": "test_any_of_and_ranges_include_staged_rows",
    "after delete in next batch the row leaves the index": "test_an_index_follows_every_change_of_its_rows",
    "getWhere throws a user friendly error for an invalid filter": "test_an_invalid_condition_is_refused_with_a_hint",
    # 5.2 LoadLayer
    "Missing id: one IN query, None": "test_a_batch_of_uncached_rows_takes_a_single_query_and_a_cached_batch_takes_none",
    "two awaited gets: two queries": "test_concurrent_gets_of_a_handler_share_a_query",
    "second get of same id: no query (negative cache)": "test_a_batch_of_uncached_rows_takes_a_single_query_and_a_cached_batch_takes_none",
    "calls separated by a timer don't stack": "test_concurrent_gets_of_a_handler_share_a_query",
    "concurrent gets: one IN query": "test_concurrent_gets_of_a_handler_share_a_query",
    "ids already in memory are not queried": "test_a_batch_of_uncached_rows_takes_a_single_query_and_a_cached_batch_takes_none",
    "id set during the in-flight load: memory version wins": "test_what_a_select_says_never_replaces_what_memory_knows",
    "batching is by microtask": "test_concurrent_gets_of_a_handler_share_a_query",
    "Eq and Gt/Lt issue the right filter": "test_where_returns_the_same_rows_as_a_scan_of_all_rows",
    "concurrent Eq on one field merge to In": "test_concurrent_equality_conditions_share_a_query_and_ranges_do_not",
    "rows of a merged query are distributed to the right filters": "test_concurrent_equality_conditions_share_a_query_and_ranges_do_not",
    "In+In merge": "test_concurrent_equality_conditions_share_a_query_and_ranges_do_not",
    "Gt not merged": "test_concurrent_equality_conditions_share_a_query_and_ranges_do_not",
    "second call served from memory": "test_concurrent_equality_conditions_share_a_query_and_ranges_do_not",
    "entity updated to no longer match leaves the index": "test_concurrent_equality_conditions_share_a_query_and_ranges_do_not",
    "entity set after index creation joins it": "test_concurrent_equality_conditions_share_a_query_and_ranges_do_not",
    "optional output None is not re-run": "test_an_effect_result_of_none_is_cached",
    "same input dedupes within a chain": "test_an_effect_is_called_once_per_arguments_and_its_result_survives_a_restart",
    "re-runs per chain for chain-scoped": f"- {CHAINS}",
    "shared for cross-chain": "test_an_effect_is_called_once_per_arguments_and_its_result_survives_a_restart",
    "rate limit independent per chain": f"- {CHAINS}",
    "budget survives rollback reset": "test_a_rate_limit_survives_a_rollback",
    # 5.3 Rollback
    "Should stay in reorg threshold on restart when progress is past threshold": "- history is recorded or not, at all positions alike: no threshold exists",
    "Should NOT be in reorg threshold when DB is only initialized": "- history is recorded or not, at all positions alike: no threshold exists",
    "Rollback of a single chain indexer": "test_rollback_to_any_event_equals_a_run_up_to_it",
    "same-checkpoint rewrites dedupe": "test_a_row_set_twice_by_one_event_is_one_row_of_history",
    "create+delete inside window": "test_repeated_rollbacks_restore_the_earlier_rows",
    "after rollback tables, history and checkpoints hold only replayed data": "test_a_rewind_of_the_source_rolls_the_tables_back",
    "Rolls back SET -> DELETE -> SET to the deleted state": "test_repeated_rollbacks_restore_the_earlier_rows",
    "Parks a reorg detected while a batch is still processing": "test_a_rewind_waits_for_the_running_batch",
    "Fires onRollbackCommit per affected chain after the rollback write": "- a rollback is durable when it returns: no later write exists to call back after",
    "Stores checkpoints inside of the reorg threshold for batches without items": "- every checkpoint is an event: a position without an event needs no checkpoint to return to",
    "Shouldn't detect reorg for rollbacked block": f"- {NO_SEARCH}",
    "Single chain rollback should also work for multichain indexer when another chains are stale": "test_several_sources_merge_by_time_in_any_arrival_order",
    "Rollback Dynamic Contract": f"- {NO_TARGET}",
    "Rollback of multichain indexer (single entity id change)": "test_several_sources_merge_by_time_in_any_arrival_order",
    "Rollback of multichain indexer (single entity id change + another entity on non-reorg chain)": "test_several_sources_merge_by_time_in_any_arrival_order",
    "Double reorg should NOT cause negative event counter": "test_rollback_to_any_event_equals_a_run_up_to_it",
    "Multi-chain reorg, rollback, reorg loop": "test_a_rewind_of_the_source_rolls_the_tables_back",
    "Reorg-on-reorg restores ALL chains' counters": "test_several_sources_merge_by_time_in_any_arrival_order",
    "Should not enter infinite reorg loop when reorg chain has no events processed since target checkpoint": "test_a_rewind_to_the_current_position_changes_nothing",
    "Should NOT have duplicate queries after rollback with chunked partitions": f"- {NO_TARGET}",
    "Should efficiently refetch only blocks after rollback target": "test_after_a_rewind_the_other_sources_resume_from_their_positions",
    "Flushes in-flight batch write before computing rollback diffs (no silent data loss on non-reorg chain)": "test_a_rollback_waits_for_the_commit_in_flight",
    "reverts an entity written after the rollback target": "test_repeated_rollbacks_restore_the_earlier_rows",
    "keeps a history row per committed change": "test_a_row_deleted_in_flight_and_recreated_has_each_change_once",
    "restores the pre-target value": "test_repeated_rollbacks_restore_the_earlier_rows",
    "resumes from what the previous indexer persisted": "test_a_failed_commit_ends_the_indexer_at_once_and_nothing_after_it_is_written",
    "one row per chain; each chain restored from own history": f"- {CHAINS}",
    "reads/deletes never touch another chain's same id": f"- {CHAINS}",
    "prune keeps each chain's anchor": "test_pruned_history_allows_rollback_to_its_oldest_checkpoint_only",
    "chain keeps fetching after its in-flight response is dropped by a sibling rollback": "test_after_a_rewind_the_other_sources_resume_from_their_positions",
    "RollbackClickHouseOnly": f"- {NO_CLICKHOUSE}",
    "RpcRollback": f"- {NO_SEARCH}",
    # 5.4 Writing and concurrency
    "Should not rewrite a history change already persisted by an in-flight write": "test_a_row_deleted_in_flight_and_recreated_has_each_change_once",
    "metadata folded into a queued batch write": f"- {NO_METADATA}",
    "standalone upsert when idle": f"- {NO_METADATA}",
    "unchanged metadata not rewritten": f"- {NO_METADATA}",
    "full snapshot on any change": f"- {NO_METADATA}",
    "PruneStaleHistory: at most 5 oldest first, written entities excluded": "- history is pruned in the transaction of the commit: nothing races with it",
    "PruneStaleHistory: starved ones forced": "test_history_is_pruned_continuously_and_covers_the_configured_range",
    "PruneStaleHistory: rollback write, none concurrent": "- history is pruned in the transaction of the commit: nothing races with it",
    "PruneStaleHistory: non-Postgres skipped": "test_pruned_history_allows_rollback_to_its_oldest_checkpoint_only",
    "launch runs then is skipped once stopped": "test_stop_commits_the_handled_events_and_the_next_run_continues",
    "processing flag released when idle": "test_stop_commits_the_handled_events_and_the_next_run_continues",
    "second loop is a no-op": "test_a_second_concurrent_run_is_refused",
    "errorExit stops and reports once": "test_a_failed_commit_ends_the_indexer_at_once_and_nothing_after_it_is_written",
    "FinalizeBackfill: runs once when two paths reach the phase together": "test_deferred_indexes_are_built_at_first_use_or_at_the_end",
    "Throttler (4 timing rules)": f"- {NO_METADATA}",
    "random events over many queues: ordering correct and none lost": "test_sources_in_any_pieces_merge_into_the_one_order",
    "applyBatchProgress does not clobber a fetch frontier advanced meanwhile": "test_sources_in_any_pieces_merge_into_the_one_order",
    "stall seconds accrue from first mark and stop on reorg": "test_depth_zero_awaits_each_commit_before_the_next_batch",
    "EffectState: clears the cache in place but keeps stats and the rate-limit window": "test_a_rate_limit_survives_a_rollback",
    # 5.5 E2E and neighbours
    "Shouldn't allow context access after hander is resolved": "test_a_context_refuses_calls_after_its_handler_ended_and_the_indexer_stops",
    "Track effects in prom metrics": f"- {NO_PROM}",
    "restart reloads cache": "test_an_effect_is_called_once_per_arguments_and_its_result_survives_a_restart",
    "changed output schema invalidates one entry": "test_an_effect_whose_return_type_changed_is_called_again",
    "context.log inside an effect handler": "- an effect is a plain function of its arguments: it logs like any other function",
    "Chain-scoped effects": f"- {CHAINS}",
    "Effect rate limiting across multiple windows": "test_effect_calls_respect_their_limit_and_an_error_reaches_only_its_caller",
    "single call per window": "test_effect_calls_respect_their_limit_and_an_error_reaches_only_its_caller",
    "Effect cache can be disabled per-call": "test_an_uncached_effect_is_called_again_in_each_batch",
    "Effect error in one call shouldn't cause other calls to fail": "test_effect_calls_respect_their_limit_and_an_error_reaches_only_its_caller",
    "Correctly sets Prom metrics": f"- {NO_PROM}",
    "Prom readiness metrics are gated on the whole indexer": "test_deferred_indexes_are_built_at_first_use_or_at_the_end",
    "Items from later chunk wait for earlier chunk to complete": "test_sources_in_any_pieces_merge_into_the_one_order",
    "Populates config addresses on init and preserves them across restart": f"- {NO_TARGET}",
    "getOrCreate creates / loads existing": "test_get_or_create_stores_a_new_row_and_leaves_an_existing_row_unchanged",
    "getOrThrow ok / throws / custom message": "test_require_returns_an_existing_row",
    "loader failure in preload ignored, second aborts": "test_preloading_writes_nothing_and_its_errors_are_ignored",
    "set in preload invisible to that run": "test_preloading_writes_nothing_and_its_errors_are_ignored",
    "several events in one batch": "test_a_batch_of_uncached_rows_takes_a_single_query_and_a_cached_batch_takes_none",
    "cached effect once per key": "test_an_effect_is_called_once_per_arguments_and_its_result_survives_a_restart",
    "handler and effect throws reach the caller": "test_a_handler_that_raises_stops_the_indexer_and_reports_its_position",
    "mutation of returned entity leaves store intact": "test_an_entity_passed_to_a_handler_is_immutable",
    "access while running throws": "- a simulation shows committed rows only, at any moment: no access has to be refused",
    "empty chain: empty change set": "test_a_source_without_events_is_caught_up_at_once",
    "second process rejected": "test_a_second_process_learns_the_lease_holder_or_waits",
    "overlapping range rejected": "test_positions_that_do_not_increase_are_refused",
    "indexes absent during backfill, committed with ready_at, kept across restart": "test_deferred_indexes_are_built_at_first_use_or_at_the_end",
    "ready held until then; finalize once; waits for all chains": "test_deferred_indexes_are_built_at_first_use_or_at_the_end",
    "getWhere builds its index mid-backfill and returns right rows": "test_deferred_indexes_are_built_at_first_use_or_at_the_end",
    "PgIndexes and IndexManager: dedupe, serialise per table, retry, resync": "- an index is created with IF NOT EXISTS by the committer, which works serially and retries",
    "ResumeFinalize: a run that died after catching up still finalizes on resume": "test_an_indexer_that_crashes_before_building_its_indexes_builds_them_at_the_next_start",
    "Persistence: init vs resume, config-diff refusal messages": "test_a_changed_type_is_refused_with_the_difference",
    "PgStorage: exact SQL of every shape": "test_where_returns_the_same_rows_as_a_scan_of_all_rows",
    "EntityFilter: operator parsing, cross product, merge rules, error texts": "test_an_invalid_condition_is_refused_with_a_hint",
    "restart() on the same DB": "test_a_run_that_crashes_at_every_commit_ends_with_the_same_rows",
    # the origin of an event as its handlers see it
    "EventOrigin: a handler sees source, position, time and kind of its event": "test_several_sources_merge_by_time_in_any_arrival_order",
}  # fmt: skip


def collected_test_names() -> set[str]:
    """Return the names of all tests in the folders of this capability."""
    names = set()
    for folder in FOLDERS:
        for path in folder.glob("test_*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                    names.add(node.name)
    return names


TESTS: Final = collected_test_names()


@pytest.mark.parametrize("name", COUNTERPARTS)
def test_each_hyperindex_test_has_a_counterpart_or_a_reason(name: str) -> None:
    entry = COUNTERPARTS[name]
    if entry.startswith("- "):
        assert len(entry.split()) > 5, "expected a reason of more than five words"
    else:
        assert entry in TESTS


def test_the_table_holds_every_name_of_the_list() -> None:
    listed = (HERE / "hyperindex_tests.txt").read_text(encoding="utf-8").splitlines()
    assert [name for name in listed if name and name not in COUNTERPARTS] == []
    assert [name for name in COUNTERPARTS if name not in listed] == []
