"""The tests of `distributed` that are run: files, and for a quick run the tests in them that move data."""

from __future__ import annotations

ALL = [
    "distributed/tests/test_*.py",
    "distributed/protocol/tests/test_*.py",
    "distributed/shuffle/tests/test_*.py",
    "distributed/diagnostics/tests/test_*.py",
    "distributed/deploy/tests/test_local.py",
]

QUICK: dict[str, str] = {
    "distributed/tests/test_client.py": """
        submit map map_retries retries_dask_array gather gather_lost gather_strict gather_skip gather_errors
        garbage_collection_with_scatter recompute_released_key restrictions_map
        two_consecutive_clients_share_results scatter scatter_types scatter_non_list scatter_tokenize_local
        scatter_singletons scatter_typename scatter_hash scatter_hash_2 get_releases_data directed_scatter
        scatter_direct scatter_direct_2 scatter_direct_numpy scatter_direct_broadcast
        scatter_direct_balanced scatter_direct_broadcast_target scatter_direct_empty
        scatter_direct_spread_evenly gather_direct gather_traceback async_compute_with_scatter
        remote_scatter_gather cancel rebalance rebalance_workers_and_keys receive_lost_key
        workers_register_indirect_data replicate replicate_tuple_keys replicate_workers
        replicate_tree_branching client_replicate balanced_with_submit_and_resident_data bad_tasks_fail
        lose_scattered_data partially_lose_scattered_data scatter_compute_lose scatter_compute_store_lose
        scatter_type retire_workers_2 scatter_dict_workers retire_workers robust_unserializable
        robust_undeserializable robust_undeserializable_function serialize_collections
        serialize_collections_of_futures de_serialization de_serialization_none scatter_error_cancel
        direct_async multiple_scatter map_large_kwargs_in_graph retry_dependencies
        get_mix_futures_and_SubgraphCallable_dask_dataframe dont_hold_on_to_large_messages
        unpacks_remotedata_namedtuple gather_race_vs_AMM release_persisted_collection
        badly_serialized_exceptions
    """,
    "distributed/tests/test_worker.py": """
        worker_task_data gather gather_missing_keys gather_missing_workers gather_missing_workers_replicated
        gather_many_small clean_up_dependencies hold_onto_dependents dataframe_attribute_error
        prefer_gather_from_local_address worker_descopes_data gather_dep_local_workers_first
        who_has_consistent_remove_replicas acquire_replicas_large_data missing_released_zombie_tasks
        gather_dep_cancelled_rescheduled gather_dep_no_longer_in_flight_tasks get_data_cancelled_error
        offload_getdata message_breakup
    """,
    "distributed/tests/test_scheduler.py": """
        respect_data_in_memory recompute_released_results feed_large_bytestring delete_data broadcast
        result_type gather_failing_can_recover gather_no_workers gather_bad_worker gather_on_worker
        gather_on_worker_bad_recipient gather_on_worker_bad_sender gather_on_worker_bad_sender_replicated
        gather_on_worker_key_not_on_sender gather_on_worker_duplicate_task rebalance rebalance_missing_data1
        delete_worker_data scatter_creates_ts missing_data_errant_worker
    """,
    "distributed/tests/test_actor.py": """
        client_actions worker_actions track_dependencies future future_dependencies numpy_roundtrip
        numpy_roundtrip_getattr Actors_create_dependencies worker_actor_handle_is_weakref
        serialize_with_pickle worker_client_async
    """,
    "distributed/tests/test_active_memory_manager.py": """
        replicate double_replicate_stress drop_from_worker_with_least_free_memory dont_replicate_actors
        RetireWorker_with_actor
    """,
    "distributed/tests/test_worker_client.py": """
        submit_from_worker scatter_from_worker scatter_singleton gather_multi_machine
        compute_within_worker_client
    """,
    "distributed/tests/test_publish.py": "publish_simple publish_roundtrip publish_bag",
    "distributed/tests/test_queues.py": "queue queue_with_data hold_futures",
    "distributed/tests/test_variable.py": "variable queue_with_data hold_futures",
    "distributed/tests/test_utils_comm.py": """
        gather_from_workers_missing_replicas gather_from_workers_permissive
        gather_from_workers_permissive_flaky gather_from_workers_busy
        gather_from_workers_serialization_error
    """,
    "distributed/tests/test_failed_workers.py": """
        failing_worker_with_additional_replicas_on_cluster forget_data_not_supposed_to_have
        worker_who_has_clears_after_failed_connection submit_after_failed_worker_async
    """,
    "distributed/tests/test_nanny.py": "nanny_restart",
    "distributed/tests/test_worker_memory.py": """
        fail_to_pickle_execute_1 fail_to_pickle_execute_2 fail_to_pickle_spill spill_target_threshold
        spill_constrained spill_spill_threshold override_data_worker delete_spilled_keys
        dict_data_if_no_spill_to_disk
    """,
    "distributed/tests/test_spill.py": "psize spillbuffer spillbuffer_maxlim",
    "distributed/tests/test_cancelled_state.py": """
        flight_to_executing_via_cancelled_resumed in_flight_lost_after_resumed cancelled_error
    """,
    "distributed/tests/test_as_completed.py": "as_completed_async as_completed_with_results_async",
    "distributed/tests/test_dask_collections.py": "dask_array_collections sparse_arrays",
    "distributed/protocol/tests/test_serialize.py": """
        scatter context_specific_serialization context_specific_serialization_class
    """,
    "distributed/shuffle/tests/test_shuffle.py": "shuffle_stable_ordering handle_categorical_data",
    "distributed/shuffle/tests/test_merge.py": "merge_by_multiple_columns",
}
"""For each file, the names of tests without ``test_``. Tests that a version does not have are left out."""
