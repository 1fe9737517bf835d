"""Drops each wait, event and order that keeps a snapshot whole, in turn: which test finds that?

    python tests/cpp/dropped_waits.py [WORD...]      those whose line in the table has a WORD

Each is dropped from a copy of the sources, and the test that is to find it runs there: in a build
with the driver of tests/cpp/fake_cuda, or by pytest. A test that fails, crashes or does not end has
found it. Exit status 1 if one survives, or if a test fails without anything being dropped. Needs
cmake, ninja, a C++ compiler and what the Python tests need; takes some 20 minutes on two cores.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = 60
"""A test that takes longer waits for ever; they all take less than 10 s."""


@dataclass(frozen=True)
class Drop:
    """Something that is not done any more. `before` occurs once in `file`, and becomes `after`;
    `test` is a C++ program and the test in it, or what pytest runs."""

    what: str
    file: str
    before: str
    after: str
    test: str

    def apply(self, text: str) -> str:
        """The file without it."""
        if text.count(self.before) != 1:
            raise SystemExit(
                f"dropped_waits: {self.file} has changed: what is dropped as {self.what!r} is in "
                f"it {text.count(self.before)} times; mend the table"
            )
        return text.replace(self.before, self.after)


DEVICE, FLIGHT, SEAM = (f"csrc/{name}.cpp" for name in ("cuda_device", "in_flight", "device"))
POOL, STAGING, ENGINE, RESTORE = (
    f"csrc/{name}.cpp" for name in ("slot_pool", "staging", "engine", "restore")
)
OVERLAP = "tests/test_overlap.py::test_"
CAPTURE, GATE, COMMIT, SNAPSHOTTER, LAYOUT = (
    f"pysnap/{name}.py" for name in ("capture", "gate", "commit", "snapshotter", "layout")
)


def context(doing: str, before: str, test: str, *, checked: bool = True) -> Drop:
    """The context of the device is not entered for one of its methods, which `before` begins."""
    entered = "    const Current current(context_);\n" + "    current.check();\n" * checked
    return Drop(f"the context, {doing}", DEVICE, before + entered, before, test)


DROPS = [
    # The device: contexts
    Drop(
        "the context is popped again",
        DEVICE,
        "    if (result_ == kCudaSuccess) driver_.cuCtxPopCurrent_v2(&popped);\n",
        "    static_cast<void>(popped);\n",
        "cuda_device_test tiny_sources_cross_together",
    ),
    Drop(
        "calls do not spoil a graph that is captured",
        DEVICE,
        "    exchanged_ = driver_.cuThreadExchangeStreamCaptureMode(&capture_mode_) =="
        " kCudaSuccess;\n",
        "",
        "cuda_engine_test a_graph_may_be_captured_beside_a_snapshot",
    ),
    Drop(
        "the mode of graphs is put back",
        DEVICE,
        "    if (exchanged_) driver_.cuThreadExchangeStreamCaptureMode(&capture_mode_);\n",
        "",
        "cuda_device_test tiny_sources_cross_together",
    ),
    context(
        "opening a device",
        "      : context_(std::move(driver), device) {\n",
        "cuda_device_test tiny_sources_cross_together",
    ),
    context(
        "closing it",
        "  ~CudaDevice() override {\n",
        "cuda_device_test tiny_sources_cross_together",
        checked=False,
    ),
    context(
        "ordering after a stream",
        "  void follow(StreamHandle stream) override {\n",
        "cuda_engine_test a_capture_comes_after_what_was_queued_before",
    ),
    context(
        "ordering a stream after us",
        "  void gate(StreamHandle stream) override {\n",
        "cuda_device_test a_clone_stays_as_it_is",
    ),
    context(
        "reading",
        "  void read(void* slot, const std::vector<Source>& sources) override {\n",
        "cuda_device_test tiny_sources_cross_together",
    ),
    context(
        "writing",
        "  void write(const void* slot, const std::vector<Place>& places) override {\n",
        "cuda_device_test tiny_places_are_written_together",
    ),
    context(
        "reserving memory for clones",
        "  void reserve_clone(std::size_t size) override {\n",
        "cuda_device_test a_clone_stays_as_it_is",
    ),
    context(
        "cloning",
        "  std::optional<std::uint64_t> clone(const std::vector<Source>& sources) override {\n",
        "cuda_device_test a_clone_stays_as_it_is",
    ),
    context(
        "pinning",
        "  void pin(void* memory, std::size_t size) override {\n",
        "cuda_device_test memory_is_pinned_before_it_is_used",
    ),
    context(
        "unpinning",
        "  void unpin(void* memory) noexcept override {\n",
        "cuda_device_test memory_is_pinned_before_it_is_used",
        checked=False,
    ),
    Drop(
        "the context, destroying an event",
        DEVICE,
        "  ~CudaFence() override {\n    const Current current(device_->context());\n",
        "  ~CudaFence() override {\n",
        "cuda_device_test tiny_sources_cross_together",
    ),
    Drop(
        "the context, recording an event",
        DEVICE,
        "    const Current current(device_->context());\n    recorded_ = current.ok() && event_ &&",
        "    recorded_ = event_ &&",
        "cuda_device_test tiny_sources_cross_together",
    ),
    Drop(
        "a context that cannot be entered counts as one that still copies",
        DEVICE,
        "    if (!current.ok() && !current.is_gone()) return false;\n",
        "",
        "cuda_device_test a_call_that_is_refused_says_nothing_of_copies",
    ),
    Drop(
        "so does one whose event cannot be asked",
        DEVICE,
        "    if (result != kCudaSuccess && driver.cuStreamQuery(",
        "    if (false && driver.cuStreamQuery(",
        "cuda_device_test a_call_that_is_refused_says_nothing_of_copies",
    ),
    # The device: events and streams
    Drop(
        "the event between two streams is recorded",
        DEVICE,
        "  event.record(earlier);\n",
        "  static_cast<void>(earlier);\n",
        "cuda_engine_test a_capture_comes_after_what_was_queued_before",
    ),
    Drop(
        "the later stream waits for that event",
        DEVICE,
        "driver.check(driver.cuStreamWaitEvent(later, event.get(), 0),",
        "driver.check((static_cast<void>(later), kCudaSuccess),",
        "cuda_engine_test a_capture_comes_after_what_was_queued_before",
    ),
    Drop(
        "our stream waits for the caller's",
        DEVICE,
        "    chain(driver(), to_stream(stream), stream_);\n",
        "",
        "cuda_engine_test a_capture_comes_after_what_was_queued_before",
    ),
    Drop(
        "the caller's stream waits for ours",
        DEVICE,
        "    chain(driver(), stream_, to_stream(stream));\n",
        "",
        "cuda_engine_test what_is_queued_after_the_gate_comes_after_all_copies",
    ),
    Drop(
        "a stream that captures a graph is never followed",
        DEVICE,
        """    if (is_capturing(driver(), to_stream(stream))) {
      throw""",
        """    if (false) {
      throw""",
        "cuda_engine_test a_snapshot_inside_the_capture_of_a_graph_fails",
    ),
    Drop(
        "nor made to wait",
        DEVICE,
        "    if (is_capturing(driver(), to_stream(stream))) return;\n",
        "",
        "cuda_engine_test a_graph_may_be_captured_beside_a_snapshot",
    ),
    Drop(
        "copies from the device are on our stream",
        DEVICE,
        "cuMemcpyDtoHAsync_v2(to, address, length, stream_)",
        "cuMemcpyDtoHAsync_v2(to, address, length, nullptr)",
        "cuda_engine_test what_is_queued_after_capture_comes_after_the_eager_copies",
    ),
    Drop(
        "copies to the device are on our stream",
        DEVICE,
        "cuMemcpyHtoDAsync_v2(to, from, length, stream_)",
        "cuMemcpyHtoDAsync_v2(to, from, length, nullptr)",
        "cuda_restore_test devices_are_whole_when_restore_returns",
    ),
    Drop(
        "copies within the device are on our stream",
        DEVICE,
        "cuMemcpyDtoDAsync_v2(piece.to, piece.from, piece.length, stream_)",
        "cuMemcpyDtoDAsync_v2(piece.to, piece.from, piece.length, nullptr)",
        "cuda_device_test a_clone_stays_as_it_is",
    ),
    Drop(
        "the kernel is on our stream",
        DEVICE,
        "kernel_->copy(small, stream_)",
        "kernel_->copy(small, nullptr)",
        "cuda_device_test tiny_places_are_written_together",
    ),
    Drop(
        "while a thread reads, no other one uses the scratch memory",
        DEVICE,
        """    const std::lock_guard<std::mutex> lock(scratch_mutex_);
    auto* to""",
        "    auto* to",
        "cuda_device_test the_scratch_memory_belongs_to_one_thread",
    ),
    Drop(
        "nor while one writes",
        DEVICE,
        """    const std::lock_guard<std::mutex> lock(scratch_mutex_);
    const auto* from""",
        "    const auto* from",
        "cuda_device_test the_scratch_memory_belongs_to_one_thread",
    ),
    Drop(
        "the event of a fence is recorded",
        DEVICE,
        "device_->driver().cuEventRecord(event_->get(), device_->stream()) == kCudaSuccess;",
        "true;",
        "cuda_device_test tiny_sources_cross_together",
    ),
    Drop(
        "a fence asks its event",
        DEVICE,
        "recorded_ ? driver.cuEventQuery(event_->get()) :",
        "recorded_ ? kCudaSuccess :",
        "cuda_device_test tiny_sources_cross_together",
    ),
    Drop(
        "a fence without a recorded event asks the stream",
        DEVICE,
        ": driver.cuStreamQuery(device_->stream());",
        ": kCudaSuccess;",
        "cuda_device_test a_fence_without_an_event_waits_for_the_stream",
    ),
    Drop(
        "a fence tells a copy that failed",
        DEVICE,
        '    driver.check(result, "a copy between host and device");\n',
        "",
        "cuda_engine_test a_device_that_is_lost_during_the_last_copy_fails_the_job",
    ),
    Drop(
        "a fence keeps its device open",
        DEVICE,
        "std::make_unique<CudaFence>(shared_from_this())",
        "std::make_unique<CudaFence>(std::shared_ptr<CudaDevice>(std::shared_ptr<void>(), this))",
        "cuda_hang_test close_does_not_wait_for_ever",
    ),
    Drop(
        "memory is registered for all contexts",
        DEVICE,
        "cuMemHostRegister_v2(memory, size, kCudaPortable)",
        "cuMemHostRegister_v2(memory, size, 0)",
        "cuda_device_test memory_is_pinned_before_it_is_used",
    ),
    # The seam
    Drop(
        "a device without a stream is refused",
        SEAM,
        "    if (index != kHost && !named) {",
        "    if (false && !named) {",
        "cuda_engine_test a_device_without_a_stream_fails_the_job",
    ),
    Drop(
        "the streams of every device are ordered, not only the first",
        SEAM,
        "      (device->second.get()->*order)(stream);\n",
        "      return (device->second.get()->*order)(stream);\n",
        "cuda_engine_test what_is_queued_after_the_gate_comes_after_all_copies",
    ),
    # Slots in flight
    Drop(
        "a slot gets a fence of the device",
        FLIGHT,
        "  if (std::unique_ptr<Fence> fence = device.fence()) fences.emplace(&device,"
        " std::move(fence));\n",
        "",
        "cuda_device_test tiny_sources_cross_together",
    ),
    Drop(
        "of every device",
        FLIGHT,
        "  if (fences.count(&device) != 0) return;\n",
        "  if (!fences.empty()) return;\n",
        "cuda_engine_test a_chunk_is_staged_when_all_its_devices_have_copied",
    ),
    Drop(
        "fences are marked behind their copies",
        FLIGHT,
        "  for (const auto& [device, fence] : fences) fence->mark();\n",
        "",
        "cuda_device_test a_fence_waits_for_its_own_copies_alone",
    ),
    Drop(
        "a fence that is not complete is waited for",
        FLIGHT,
        "      over = fences.begin()->second->is_complete();\n",
        "      fences.begin()->second->is_complete();\n",
        "cuda_device_test tiny_sources_cross_together",
    ),
    Drop(
        "a failure is told when the other devices have copied",
        FLIGHT,
        "      if (!failure) failure = Error::from(caught);\n",
        "      throw Error::from(caught);\n",
        "cuda_device_test what_fails_on_one_device_is_told_when_the_others_have_copied",
    ),
    Drop(
        "a failure is told",
        FLIGHT,
        "  if (failure) throw *failure;\n",
        "",
        "cuda_engine_test a_device_that_is_lost_during_the_last_copy_fails_the_job",
    ),
    Drop(
        "the slot of a device that hangs is kept for ever",
        FLIGHT,
        "  abandoned->push_back(std::move(flight));\n",
        "",
        "cuda_hang_test close_does_not_wait_for_ever",
    ),
    # Staging memory
    Drop(
        "memory is registered before its slots can be had",
        POOL,
        "    if (region != nullptr && device != nullptr) refusal = pin_region(region, device);\n",
        "",
        "cuda_device_test no_slot_is_had_before_its_memory_is_pinned",
    ),
    Drop(
        "memory that is there already is registered",
        POOL,
        "    growth_.wait(lock, [&] { return stopping_ || must_grow() || must_pin(); });\n",
        "    growth_.wait(lock, [&] { return stopping_ || must_grow(); });\n",
        "cuda_device_test memory_that_exists_is_pinned_later",
    ),
    Drop(
        "what waits for memory waits for its registration",
        POOL,
        "return stopping_ || (!must_grow() && !must_pin()); });",
        "return stopping_ || !must_grow(); });",
        "cuda_device_test memory_that_exists_is_pinned_later",
    ),
    Drop(
        "and for its growth",
        POOL,
        "return stopping_ || (!must_grow() && !must_pin()); });",
        "return stopping_ || !must_pin(); });",
        "cuda_device_test memory_is_pinned_before_it_is_used",
    ),
    Drop(
        "memory is unregistered before it is given back",
        POOL,
        "  if (pinned_by != nullptr) pinned_by->unpin(memory);\n  ::munmap(memory, size);\n",
        "  ::munmap(memory, size);\n  if (pinned_by != nullptr) pinned_by->unpin(memory);\n",
        "cuda_device_test memory_is_pinned_before_it_is_used",
    ),
    Drop(
        "memory keeps open the device that it is registered with",
        POOL,
        "    region.get_deleter().pinned_by = device;\n",
        "    region.get_deleter().pinned_by = {std::shared_ptr<void>(), device.get()};\n",
        "cuda_device_test a_slot_stays_pinned_as_long_as_it_lives",
    ),
    Drop(
        "the growing thread is waited for",
        POOL,
        "  if (grower_.joinable()) grower_.join();\n",
        "  if (grower_.joinable()) grower_.detach();\n",
        "cuda_device_test stop_waits_for_memory_that_is_just_being_pinned",
    ),
    # A capture
    Drop(
        "capture comes after what the caller queued",
        ENGINE,
        "  order(devices_, streams, &Device::follow);\n",
        "",
        "cuda_engine_test a_capture_comes_after_what_was_queued_before",
    ),
    Drop(
        "the caller's streams wait for the clone",
        ENGINE,
        "  if (overlaps) order(devices_, streams, &Device::gate);\n",
        "",
        "cuda_engine_test what_is_queued_after_capture_comes_after_the_clone",
    ),
    Drop(
        "capture returns when the eager chunks are read, or queued",
        ENGINE,
        "  const bool completed = copy_until_done(interrupted);\n",
        "  const bool completed = true;\n  static_cast<void>(interrupted);\n",
        "cuda_engine_test capture_returns_when_the_eager_chunks_are_queued",
    ),
    Drop(
        "the caller's streams wait for eager chunks",
        ENGINE,
        "  order(overlaps ? uncloned : devices_, streams, &Device::gate);\n",
        "",
        "cuda_engine_test what_is_queued_after_capture_comes_after_the_eager_copies",
    ),
    Drop(
        "and for those of a device that has not cloned them",
        ENGINE,
        "      if (!at) others.insert({index, device});\n",
        "",
        "cuda_engine_test streams_wait_for_the_clone_of_eager_chunks_and_not_for_the_bus",
    ),
    Drop(
        "a capture that is interrupted ends its job",
        ENGINE,
        "  if (!completed) abort();\n",
        "",
        "cuda_engine_test a_wait_for_slots_that_devices_fill_can_be_interrupted",
    ),
    Drop(
        "lazy chunks are copied after the eager ones are in order",
        ENGINE,
        "    copy_limit_ = eager_;\n",
        "    copy_limit_ = spans_.size();\n",
        "cuda_engine_test streams_wait_for_the_clone_of_eager_chunks_and_not_for_the_bus",
    ),
    Drop(
        "the gate is passed when every byte is read, or queued",
        ENGINE,
        "  if (!copy_until_done(interrupted)) return false;\n",
        "  static_cast<void>(interrupted);\n",
        "cuda_engine_test the_chunk_that_a_helper_copies_is_waited_for",
    ),
    Drop(
        "the caller's streams wait at the gate",
        ENGINE,
        "return false;\n  order(devices_, streams, &Device::gate);\n",
        "return false;\n  static_cast<void>(streams);\n",
        "cuda_engine_test what_is_queued_after_the_gate_comes_after_all_copies",
    ),
    Drop(
        "clones have fences",
        ENGINE,
        "      landing.front().flight.enter(*device);\n",
        "",
        "cuda_engine_test the_clone_of_a_job_that_failed_is_waited_for",
    ),
    Drop(
        "which are waited for",
        ENGINE,
        "  hand_to_lander(landing);\n  engine_",
        "  engine_",
        "cuda_engine_test the_clone_of_a_job_that_failed_is_waited_for",
    ),
    Drop(
        "which are marked",
        ENGINE,
        "  if (!landing.empty()) landing.front().flight.mark();\n",
        "",
        "cuda_engine_test a_clone_is_made_anew_for_every_snapshot",
    ),
    Drop(
        "who copies waits for helpers in the middle of a chunk",
        ENGINE,
        "  engine_.progress_.wait(lock, [&] { return copying_ == 0; });\n  return true;\n",
        "  return true;\n",
        "cuda_engine_test the_chunk_that_a_helper_copies_is_waited_for",
    ),
    Drop(
        "a chunk that is being copied counts as such",
        ENGINE,
        "  ++copying_;\n  lock.unlock();\n",
        "  ++copying_, --copying_;\n  lock.unlock();\n",
        "cuda_engine_test the_chunk_that_a_helper_copies_is_waited_for",
    ),
    Drop(
        "a fence is made before the copies of its chunk",
        ENGINE,
        "      flight.enter(device);\n      device.read(start, sources);\n",
        "      device.read(start, sources);\n      flight.enter(device);\n",
        "cuda_memory_test no_slot_is_reused_during_copies_whatever_allocation_fails",
    ),
    Drop(
        "a chunk has a fence",
        ENGINE,
        "      flight.enter(device);\n      device.read(start, sources);\n",
        "      device.read(start, sources);\n",
        "cuda_engine_test staged_means_that_the_bytes_are_in_host_memory",
    ),
    Drop(
        "which is marked",
        ENGINE,
        "  flight.mark();\n}\n",
        "}\n",
        "cuda_engine_test reserve_opens_the_devices_and_pins_the_memory",
    ),
    Drop(
        "of a job that failed, too, a slot goes back only after its fences",
        ENGINE,
        "  if (landing.empty() || landing.front().flight.fences.empty()) return;\n",
        "  if (failure_ || landing.empty() || landing.front().flight.fences.empty()) return;\n",
        "cuda_engine_test slots_of_a_job_that_failed_are_not_reused_during_its_copies",
    ),
    Drop(
        "a chunk that devices copy counts as such",
        ENGINE,
        "  ++landing_;\n",
        "",
        "cuda_engine_test staged_means_that_the_bytes_are_in_host_memory",
    ),
    Drop(
        "a worker is woken for the digest of what was written",
        ENGINE,
        "    job->write_raw(lock, writers_);\n    wake_another();\n",
        "    job->write_raw(lock, writers_);\n",
        "engine_test writers_write_past_the_page_cache_and_workers_do_the_work",
    ),
    Drop(
        "writers and workers are woken when the copy is over",
        ENGINE,
        "  engine_.wake_workers();\n  engine_.copies_.notify_all();\n",
        "  engine_.copies_.notify_all();\n",
        "engine_test what_is_to_be_encoded_waits_until_all_is_copied",
    ),
    Drop(
        "the lander is woken",
        ENGINE,
        "  engine_.landed_.notify_one();\n",
        "",
        "cuda_engine_test staged_means_that_the_bytes_are_in_host_memory",
    ),
    Drop(
        "the lander waits for fences",
        ENGINE,
        "      over = oldest.wait(kPoll);\n",
        "      static_cast<void>(oldest);\n",
        "cuda_engine_test staged_means_that_the_bytes_are_in_host_memory",
    ),
    Drop(
        "again and again",
        ENGINE,
        "    if (!over && (!last_landing_ || std::chrono::steady_clock::now() < *last_landing_))"
        " continue;\n",
        "",
        "cuda_engine_test close_waits_for_the_devices",
    ),
    Drop(
        "a failed copy fails the job",
        ENGINE,
        "    if (failure) job.fail(*failure);\n",
        "",
        "cuda_engine_test a_device_that_is_lost_during_the_last_copy_fails_the_job",
    ),
    Drop(
        "the slot of a device that hangs is not handed over",
        ENGINE,
        "    if (over && landing.flight.slot.data() != nullptr)\n",
        "    if (landing.flight.slot.data() != nullptr)\n",
        "cuda_hang_test close_does_not_wait_for_ever",
    ),
    Drop(
        "but kept for ever",
        ENGINE,
        "    if (!over) abandon(std::move(landing.flight));\n",
        "",
        "cuda_hang_test close_does_not_wait_for_ever",
    ),
    Drop(
        "staged are chunks that have been copied",
        ENGINE,
        "[&] { return is_idle() && (failure_ || next_copy_ == spans_.size()); }",
        "[&] { return failure_ || next_copy_ == spans_.size(); }",
        "cuda_engine_test staged_means_that_the_bytes_are_in_host_memory",
    ),
    Drop(
        "all of them",
        ENGINE,
        "[&] { return is_idle() && (failure_ || next_copy_ == spans_.size()); }",
        "[&] { return is_idle(); }",
        "engine_test capture_copies_the_eager_chunks_alone",
    ),
    Drop(
        "a job that ends waits for threads in the middle of a chunk",
        ENGINE,
        "  engine_.progress_.wait(lock, [&] { return copying_ == 0; });\n"
        "  engine_.progress_.wait_for(",
        "  engine_.progress_.wait_for(",
        "cuda_engine_test abort_waits_for_the_chunk_that_a_helper_copies",
    ),
    Drop(
        "and for devices",
        ENGINE,
        "  engine_.progress_.wait_for(lock, engine_.options_.device_timeout, [&] { return"
        " is_idle(); });\n",
        "",
        "cuda_engine_test nothing_is_read_after_the_job_has_ended",
    ),
    Drop(
        "staging memory is registered",
        STAGING,
        "    if (index != kHost) slots_->pin(device);\n",
        "",
        "cuda_engine_test reserve_opens_the_devices_and_pins_the_memory",
    ),
    Drop(
        "memory for clones is made",
        ENGINE,
        "    if (eager <= kMostCloned) opened->reserve_clone(static_cast<std::size_t>(eager));\n",
        "",
        "cuda_engine_test streams_wait_for_the_clone_of_eager_chunks_and_not_for_the_bus",
    ),
    Drop(
        "one job is in flight at a time",
        ENGINE,
        "  if (active_ != nullptr) throw",
        "  if (false) throw",
        "engine_test a_job_that_nobody_holds_is_still_in_flight",
    ),
    Drop(
        "close waits for helpers and workers",
        ENGINE,
        "  for (std::thread& thread : threads_) thread.join();\n",
        "",
        "cuda_engine_test the_chunk_that_a_helper_copies_is_waited_for",
    ),
    Drop(
        "and for the caller in the middle of a chunk",
        ENGINE,
        "    if (job != nullptr) progress_.wait(lock, [&] { return job->copying_ == 0; });\n",
        "",
        "cuda_engine_test close_waits_for_the_chunk_that_the_caller_copies",
    ),
    Drop(
        "and for the lander",
        ENGINE,
        "  if (lander_.joinable()) lander_.join();\n",
        "  if (lander_.joinable()) lander_.detach();\n",
        "cuda_engine_test close_waits_for_the_devices",
    ),
    Drop(
        "which ends when nothing flies any more",
        ENGINE,
        "    if (landing_.empty()) return;\n",
        "    if (last_landing_ || landing_.empty()) return;\n",
        "cuda_engine_test close_waits_for_the_devices",
    ),
    # A restore
    Drop(
        "a restore comes after what the caller queued",
        RESTORE,
        "  order_streams(devices, streams, &Device::follow);\n",
        "  static_cast<void>(streams);\n",
        "cuda_restore_test what_was_queued_before_restore_comes_before_it",
    ),
    Drop(
        "what was checked in place is copied before the disk is waited for",
        RESTORE,
        "    if (!stays && in_place_) finish();\n",
        "",
        "restore_test a_chunk_that_was_checked_in_place_is_copied_before_the_file_is_read",
    ),
    Drop(
        "the bytes of a slot are on the host before it is used again",
        RESTORE,
        "    if (slot != nullptr) finish();\n",
        "",
        "cuda_restore_test a_slot_is_on_the_host_before_others_have_it",
    ),
    Drop(
        "a slot gets a fence of the device",
        RESTORE,
        "        flight.front().enter(*device);\n",
        "",
        "cuda_restore_test devices_are_whole_when_restore_returns",
    ),
    Drop(
        "before its copies",
        RESTORE,
        "        flight.front().enter(*device);\n"
        "        device->write(flight.front().slot.data(), places);\n",
        "        device->write(flight.front().slot.data(), places);\n"
        "        flight.front().enter(*device);\n",
        "cuda_memory_test a_restore_is_whole_or_fails_whatever_allocation_fails",
    ),
    Drop(
        "which is marked behind them",
        RESTORE,
        "    flight.front().mark();\n",
        "",
        "cuda_restore_test devices_are_whole_when_restore_returns",
    ),
    Drop(
        "a slot that is copied from is kept",
        RESTORE,
        "    keep(flight);\n    if (failure)",
        "    if (failure)",
        "cuda_restore_test devices_are_whole_when_restore_returns",
    ),
    Drop(
        "a slot whose copy has ended is used again, and no other",
        RESTORE,
        "      if (!flight.empty() && flight.front().wait(kNoWait)) return",
        "      if (!flight.empty()) return",
        "cuda_restore_test devices_are_whole_when_restore_returns",
    ),
    Drop(
        "one that is still copied from is kept when another is taken",
        RESTORE,
        "        put_back(flight);\n",
        "",
        "cuda_restore_test devices_are_whole_when_restore_returns",
    ),
    Drop(
        "a slot is used again after its fences",
        RESTORE,
        "        if (!wait(flight, stopped)) return std::nullopt;\n",
        "",
        "cuda_restore_test devices_are_whole_when_restore_returns",
    ),
    Drop(
        "a slot whose wait was interrupted is kept",
        RESTORE,
        "      if (!stopped || !stopped()) continue;\n      keep(flight);\n",
        "      if (!stopped || !stopped()) continue;\n",
        "cuda_restore_test an_interrupted_wait_for_the_only_copy_leaves_it_its_slot",
    ),
    Drop(
        "restore returns when every copy has ended well",
        RESTORE,
        "             handle, interrupted) &&\n"
        "         (!uploads || uploads->finish(interrupted));\n",
        "             handle, interrupted);\n",
        "cuda_restore_test a_device_that_is_lost_during_the_last_copy_is_an_error",
    ),
    Drop(
        "one that fails, when every copy has ended",
        RESTORE,
        "        if (!flight.front().wait(left)) abandon(std::move(flight.front()));\n",
        "        static_cast<void>(left);\n",
        "cuda_restore_test nothing_is_copied_after_a_failure",
    ),
    Drop(
        "the slot of a device that hangs is kept for ever",
        RESTORE,
        "        if (!flight.front().wait(left)) abandon(std::move(flight.front()));\n",
        "        flight.front().wait(left);\n",
        "cuda_hang_test restore_does_not_wait_for_ever",
    ),
    # Python: the gate
    Drop(
        "an optimizer's step waits",
        GATE,
        "            wait()\n",
        "",
        OVERLAP + "the_optimizer_waits_until_everything_is_copied[plain]",
    ),
    Drop(
        "for the snapshot in flight",
        SNAPSHOTTER,
        "            newest.gate()\n",
        "            pass\n",
        OVERLAP + "the_optimizer_waits_until_everything_is_copied[plain]",
    ),
    Drop(
        "until everything is read",
        CAPTURE,
        "            self._job.gate(current_streams(self._devices))\n",
        "",
        OVERLAP + "the_optimizer_waits_until_everything_is_copied[plain]",
    ),
    Drop(
        "and staged, where the step is captured in a graph",
        CAPTURE,
        "                self._job.wait_staged()\n",
        "                pass\n",
        OVERLAP + "a_step_that_is_captured_in_a_graph_is_waited_for_and_copied_at_once"
        "_from_then_on",
    ),
    Drop(
        "what a graph changes is copied at once",
        GATE,
        "                self._leave(optimizer)\n",
        "                pass\n",
        OVERLAP + "a_step_that_is_captured_in_a_graph_is_waited_for_and_copied_at_once"
        "_from_then_on",
    ),
    Drop(
        "and what may be in a graph already",
        GATE,
        "if not _is_capturable(optimizer)]",
        "]",
        OVERLAP + "an_optimizer_that_is_made_for_graphs_is_copied_at_once",
    ),
    Drop(
        "what an optimizer without hooks changes is copied at once",
        GATE,
        "isinstance(part, torch.optim.Optimizer) and _calls_hooks(part)",
        "isinstance(part, torch.optim.Optimizer)",
        OVERLAP + "an_optimizer_without_hooks_is_copied_at_once",
    ),
    Drop(
        "everything is, outside the main thread",
        GATE,
        "        if not is_main:\n            return []\n",
        "",
        OVERLAP + "outside_the_main_thread_everything_is_copied_at_once",
    ),
    Drop(
        "everything is, at the end of an epoch",
        SNAPSHOTTER,
        "self._take_if(self._schedule.after_epoch(self.progress.epoch), overlap=False)",
        "self._take_if(self._schedule.after_epoch(self.progress.epoch), overlap=True)",
        OVERLAP + "the_end_of_an_epoch_is_copied_at_once",
    ),
    Drop(
        "everything is, after a tensor changed too early",
        SNAPSHOTTER,
        "            self._gate.give_up()\n",
        "            pass\n",
        OVERLAP + "a_tensor_that_changes_too_early_fails_the_snapshot[clamp]",
    ),
    Drop(
        "bytes that somebody else may write are copied at once",
        LAYOUT,
        "        run.lazy = all(",
        "        run.lazy = any(",
        OVERLAP + "an_array_that_shares_memory_with_a_weight_is_copied_at_once",
    ),
    Drop(
        "the engine gets the caller's streams",
        LAYOUT,
        "torch.cuda.current_stream(index).cuda_stream",
        "0",
        "tests/test_cuda.py::test_the_engine_gets_the_current_stream_of_each_device",
    ),
    # Python: counts of changes
    Drop(
        "counts of changes are compared",
        CAPTURE,
        "        same = map(operator.eq, changes, self._before)\n",
        "        same = map(operator.eq, self._before, self._before)\n",
        OVERLAP + "a_tensor_that_changes_too_early_fails_the_snapshot[element]",
    ),
    Drop(
        "before the snapshot is committed",
        CAPTURE,
        "        self._guard.settle()\n",
        "",
        OVERLAP + "a_tensor_that_changes_too_early_fails_the_snapshot[element]",
    ),
    Drop(
        "but not before everything is read",
        CAPTURE,
        '        with trace.span("wait until staged"):\n            self._note_staged(None)\n',
        "",
        OVERLAP + "changes_are_looked_for_only_when_everything_is_copied",
    ),
    Drop(
        "at the gate: what changes behind it does not matter",
        CAPTURE,
        "            self._guard.look()\n            self._tell_given_up()\n",
        "            self._tell_given_up()\n",
        OVERLAP + "what_the_optimizer_changes_behind_the_gate_does_not_matter",
    ),
    Drop(
        "by a main thread that waits for the snapshot",
        CAPTURE,
        "threading.current_thread() is threading.main_thread():\n            self._guard.look()\n",
        "threading.current_thread() is threading.main_thread():\n            pass\n",
        OVERLAP + "the_training_thread_may_wait_for_it",
    ),
    Drop(
        "or for its end, before the next one",
        COMMIT,
        "            self.newest.gate()\n            self.newest._done.wait()\n",
        "            self.newest._done.wait()\n",
        OVERLAP + "a_tensor_that_changes_too_early_fails_the_snapshot[clamp]",
    ),
    Drop(
        "or for that of the program",
        COMMIT,
        "            self.newest.gate()\n        self._threads",
        "            pass\n        self._threads",
        OVERLAP + "it_becomes_durable_however_the_program_ends[del program]",
    ),
    Drop(
        "the memory of tensors is kept until it is read",
        CAPTURE,
        "[planned.plan.keep, storages]",
        "[planned.plan.keep]",
        OVERLAP + "tensors_that_are_given_other_memory_are_read_where_they_were",
    ),
    Drop(
        "or its copy is aborted",
        CAPTURE,
        "        self._job.abort()\n        self._keep = []\n",
        "        self._keep = []\n",
        OVERLAP + "tensors_are_let_go_when_an_aborted_copy_has_ended",
    ),
]


class Copy:
    """The sources in a folder of their own, and a build of the C++ tests."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "pysnap"
        self._build = folder / "build"
        self._is_configured = False
        ignored = shutil.ignore_patterns("__pycache__", ".*")
        for name in ("csrc", "pysnap", "tests"):
            shutil.copytree(ROOT / name, self.root / name, ignore=ignored)
        for name in ("CMakeLists.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root / name)

    def finding_without(self, drop: Drop) -> str | None:
        """What its test says of the sources without it."""
        path = self.root / drop.file
        whole = path.read_text()
        text = drop.apply(whole)
        if path.suffix == ".py":
            compile(text, drop.file, "exec")
        path.write_text(text)
        try:
            return self.finding(drop.test)
        finally:
            path.write_text(whole)

    def finding(self, test: str) -> str | None:
        """What the test says of the sources as they are; None if it passes."""
        is_python = "::" in test
        command = self._python(test) if is_python else self._cpp(*test.split())
        path = "PYTHONPATH" if is_python else "LD_LIBRARY_PATH"
        place = self.root if is_python else self._build / "fake_cuda"
        process = subprocess.Popen(
            command,
            cwd=self.root,
            env=os.environ | {path: str(place), "PYTHONDONTWRITEBYTECODE": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            status = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            return "does not end"
        finally:
            # With what the test has started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if status == 0:
            return None
        return "fails" if status > 0 else f"signal {-status}"

    def _python(self, test: str) -> list[str]:
        return [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]

    def _cpp(self, program: str, name: str) -> list[str]:
        if not self._is_configured:
            options = ("-DPYSNAP_TESTS=ON", "-DCMAKE_CXX_FLAGS_RELEASE=-O1")
            self._run("cmake", "-S", self.root, "-B", self._build, "-G", "Ninja", *options)
            self._is_configured = True
        self._run("cmake", "--build", self._build, "--target", program, "fake_cuda")
        return [str(self._build / program), name]

    def _run(self, *command: str | Path) -> None:
        done = subprocess.run(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
        if done.returncode != 0:
            sys.exit(done.stdout.decode())


def main(words: list[str]) -> int:
    drops = [
        drop
        for drop in DROPS
        if not words or any(word in f"{drop.file} {drop.what} {drop.test}" for word in words)
    ]
    survivors = 0
    with tempfile.TemporaryDirectory(prefix="pysnap-waits-") as folder:
        copy = Copy(Path(folder))
        for test in sorted({drop.test for drop in drops}):
            found = copy.finding(test)
            if found is not None:
                print(f"{test}: {found} although nothing is dropped")
                return 1
        print("| file | dropped | found by | |\n|---|---|---|---|", flush=True)
        for drop in drops:
            found = copy.finding_without(drop)
            survivors += found is None
            print(
                f"| {Path(drop.file).name} | {drop.what} | {drop.test} | {found or 'SURVIVES'} |",
                flush=True,
            )
    print(f"\n{len(drops)} dropped, {survivors} of them not found")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
