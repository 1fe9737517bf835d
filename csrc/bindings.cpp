// bindings.cpp: the engine as the Python module pysnap._engine. It and bindings_objects.cpp alone
// know Python; they know NumPy but not torch.
//
// The GIL is released around everything that copies, waits or touches a disk, and taken again only
// to look for signals.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings_objects.h"
#include "codec.h"
#include "copy.h"
#include "cpu.h"
#include "cuda_driver.h"
#include "digest.h"
#include "engine.h"
#include "error.h"
#include "file.h"
#include "restore.h"
#include "thread.h"
#include "trace.h"
#include "zstd.h"

namespace py = pybind11;

namespace pysnap {
namespace {

// A row of a chunk table as NumPy sees it: StoredChunk with a flat digest.
struct ChunkRow {
  std::uint32_t pack;
  std::uint32_t raw;
  std::uint32_t stored;
  std::uint8_t element;
  std::uint8_t encoding;
  std::uint64_t offset;
  std::uint64_t digest_high;
  std::uint64_t digest_low;
};

struct SpanRow {
  std::uint32_t raw;
  std::uint8_t element;
};

// Contiguous bytes of a Python object, while this lives.
struct ByteView {
  ByteView(const py::buffer& object, bool writable) : info(object.request(writable)) {
    if (PyBuffer_IsContiguous(info.view(), 'C') == 0)
      throw Error(ErrorKind::kInvalid, "the bytes of a buffer must be contiguous");
    data = static_cast<std::uint8_t*>(info.ptr);
    size = static_cast<std::size_t>(info.size * info.itemsize);
  }

  py::buffer_info info;
  std::uint8_t* data;
  std::size_t size;
};

// One chunk at a time, for benchmarks and tests. Not for several threads at once.
struct Coder {
  PlanesEncoder encoder;
  PlanesDecoder decoder;
};

Element checked_element(unsigned number) {
  if (number >= kElementCount) throw Error(ErrorKind::kInvalid, "there is no such element");
  return static_cast<Element>(number);
}

template <typename Row>
using Rows = py::array_t<Row, py::array::c_style>;

template <typename Row>
std::vector<Row> to_vector(const Rows<Row>& rows) {
  if (rows.ndim() != 1) throw Error(ErrorKind::kInvalid, "a table must have one dimension");
  return std::vector<Row>(rows.data(), rows.data() + rows.size());
}

StoredChunk from_row(const ChunkRow& row) {
  return {row.pack,
          row.raw,
          row.stored,
          static_cast<Element>(row.element),
          static_cast<Encoding>(row.encoding),
          row.offset,
          {row.digest_low, row.digest_high}};
}

ChunkRow to_row(const StoredChunk& chunk) {
  return {chunk.pack,
          chunk.raw,
          chunk.stored,
          static_cast<std::uint8_t>(chunk.element),
          static_cast<std::uint8_t>(chunk.encoding),
          chunk.offset,
          chunk.digest.high,
          chunk.digest.low};
}

std::vector<StoredChunk> to_chunks(const Rows<ChunkRow>& rows) {
  std::vector<StoredChunk> chunks;
  for (const ChunkRow& row : to_vector(rows)) chunks.push_back(from_row(row));
  return chunks;
}

std::vector<PackFile> to_packs(const std::vector<std::pair<std::string, std::uint64_t>>& packs) {
  std::vector<PackFile> files;
  for (const auto& [path, size] : packs) files.push_back({path, size});
  return files;
}

// For the calling thread, which has released the GIL. Python runs signal handlers in its main
// thread only; elsewhere this says no.
bool signal_pending() {
  py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

// Waits in pieces, so that Ctrl-C and a deadline end it. `wait(timeout)` says whether it is done.
template <typename Wait>
bool wait_interruptibly(std::optional<double> timeout, Wait wait) {
  using Clock = std::chrono::steady_clock;
  constexpr std::chrono::milliseconds kPoll{100};
  // Longer than any run; keeps the arithmetic of time points in range.
  constexpr double kForever = 1e8;
  const auto seconds =
      std::chrono::duration<double>(std::clamp(timeout.value_or(kForever), 0.0, kForever));
  const auto deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(seconds);
  bool done = false;
  bool interrupted = false;
  {
    py::gil_scoped_release release;
    for (;;) {
      const auto left =
          std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now());
      done = wait(std::clamp(left, std::chrono::milliseconds{0}, kPoll));
      if (done || Clock::now() >= deadline) break;
      interrupted = signal_pending();
      if (interrupted) break;
    }
  }
  if (interrupted) throw py::error_already_set();
  return done;
}

template <typename Call>
auto run_interruptibly(Call call) {
  const bool completed = [&] {
    py::gil_scoped_release release;
    return call();
  }();
  if (!completed) throw py::error_already_set();
}

Codec codec_named(const std::string& name) {
  if (name == "none") return Codec::kNone;
  if (name == "fast") return Codec::kFast;
  if (name == "small") return Codec::kSmall;
  if (name == "auto") return Codec::kAuto;
  throw Error(ErrorKind::kInvalid, "there is no codec " + name);
}

std::shared_ptr<const Zstd> open_zstd(const std::vector<std::string>& names) {
  return names.empty() ? nullptr : Zstd::open(names);
}

// A job that Python forgets (an exception between two bytecodes) must not stay in flight for ever.
class OwnedJob {
 public:
  explicit OwnedJob(std::shared_ptr<Job> job) : job_(std::move(job)) {}
  OwnedJob(const OwnedJob&) = delete;
  OwnedJob& operator=(const OwnedJob&) = delete;
  ~OwnedJob() {
    try {
      job_->abort();
    } catch (const Error&) {
      // A forked child: the job is its parent's.
    }
  }
  Job* operator->() const { return job_.get(); }

 private:
  const std::shared_ptr<Job> job_;
};

py::object exception_type(const char* name) {
  return py::module_::import("pysnap.errors").attr(name);
}

// Errors of C++ become those of pysnap.errors; a chunk's number travels as an attribute, for Python
// knows which tensors lie in it.
void raise(const Error& error) {
  const char* name = "Error";
  switch (error.kind()) {
    case ErrorKind::kInvalid:
      name = "ConfigError";
      break;
    case ErrorKind::kIo:
      name = "StorageError";
      break;
    case ErrorKind::kDevice:
      break;
    case ErrorKind::kTorn:
      name = "TornError";
      break;
    case ErrorKind::kCorrupt:
      name = "CorruptError";
      break;
    case ErrorKind::kClosed:
      name = "ClosedError";
      break;
  }
  py::object type = exception_type(name);
  py::object exception = error.kind() == ErrorKind::kIo
                             ? type(error.error_number(), error.what(), error.path())
                             : type(error.what());
  if (error.chunk() >= 0) exception.attr("chunk") = error.chunk();
  PyErr_SetObject(type.ptr(), exception.ptr());
}

}  // namespace
}  // namespace pysnap

PYBIND11_MODULE(_engine, module) {
  using namespace pysnap;
  module.doc() =
      "The half of pysnap that has the bytes. It knows addresses and chunks, no tensors; see "
      "_engine.pyi.";

  PYBIND11_NUMPY_DTYPE(Extent, address, length, device);
  PYBIND11_NUMPY_DTYPE(SpanRow, raw, element);
  PYBIND11_NUMPY_DTYPE(ChunkRow, pack, raw, stored, element, encoding, offset, digest_high,
                       digest_low);
  PYBIND11_NUMPY_DTYPE(Target, offset, address, length, device);
  PYBIND11_NUMPY_DTYPE(trace::Span, start, end, amount, thread, phase);
  module.attr("EXTENT") = py::dtype::of<Extent>();
  module.attr("SPAN") = py::dtype::of<SpanRow>();
  module.attr("CHUNK") = py::dtype::of<ChunkRow>();
  module.attr("TARGET") = py::dtype::of<Target>();
  module.attr("TRACED") = py::dtype::of<trace::Span>();
  module.attr("PHASES") = py::tuple(py::cast(trace::phase_names()));

  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Error& error) {
      raise(error);
    }
  });

  py::class_<OwnedJob>(module, "Job")
      .def(
          "capture",
          [](OwnedJob& job, const Streams& streams) {
            run_interruptibly([&] { return job->capture(streams, signal_pending); });
          },
          py::arg("streams") = Streams())
      .def(
          "gate",
          [](OwnedJob& job, const Streams& streams) {
            run_interruptibly([&] { return job->gate(streams, signal_pending); });
          },
          py::arg("streams") = Streams())
      .def(
          "open_pack", [](OwnedJob& job, const std::string& path) { job->open_pack(path); },
          py::arg("path"), py::call_guard<py::gil_scoped_release>())
      .def(
          "wait_staged",
          [](OwnedJob& job, std::optional<double> timeout) {
            return wait_interruptibly(timeout, [&](auto piece) { return job->wait_staged(piece); });
          },
          py::arg("timeout") = py::none())
      .def(
          "wait_written",
          [](OwnedJob& job, std::optional<double> timeout) {
            return wait_interruptibly(timeout,
                                      [&](auto piece) { return job->wait_written(piece); });
          },
          py::arg("timeout") = py::none())
      .def("finish",
           [](OwnedJob& job) {
             WrittenPack written;
             {
               py::gil_scoped_release release;
               written = job->finish();
             }
             Rows<ChunkRow> rows(static_cast<py::ssize_t>(written.chunks.size()));
             std::transform(written.chunks.begin(), written.chunks.end(), rows.mutable_data(),
                            to_row);
             return std::make_pair(rows, written.size);
           })
      .def("abort", [](OwnedJob& job) { job->abort(); }, py::call_guard<py::gil_scoped_release>());

  py::class_<Engine, std::shared_ptr<Engine>>(module, "Engine")
      .def(py::init([](std::size_t chunk_size, std::size_t slots, unsigned workers,
                       unsigned copy_threads, int nice, bool direct_io, const std::string& codec,
                       const std::vector<std::string>& zstd, double disk_seconds) {
             EngineOptions options{chunk_size,         slots,          workers,
                                   copy_threads,       nice,           direct_io,
                                   codec_named(codec), open_zstd(zstd)};
             options.disk_timeout = std::chrono::milliseconds(std::llround(disk_seconds * 1e3));
             return Engine::create(std::move(options));
           }),
           py::kw_only(), py::arg("chunk_size"), py::arg("slots"), py::arg("workers"),
           py::arg("copy_threads"), py::arg("nice"), py::arg("direct_io"), py::arg("codec"),
           py::arg("zstd"), py::arg("disk_seconds") = 60.0)
      .def("reserve", &Engine::reserve, py::arg("size"),
           py::arg("devices") = std::vector<DeviceIndex>(), py::arg("eager") = 0,
           py::call_guard<py::gil_scoped_release>())
      .def("why_pageable",
           [](const Engine& engine) {
             const std::string why = engine.why_pageable();
             return why.empty() ? std::nullopt : std::optional<std::string>(why);
           })
      .def("wait_reserved", &Engine::wait_reserved, py::call_guard<py::gil_scoped_release>())
      .def(
          "begin",
          [](Engine& engine, const Rows<Extent>& extents, const Rows<SpanRow>& spans,
             std::size_t eager) {
            std::vector<Span> cut;
            for (const SpanRow& row : to_vector(spans))
              cut.push_back({row.raw, static_cast<Element>(row.element)});
            std::vector<Extent> pieces = to_vector(extents);
            // May open a device.
            py::gil_scoped_release release;
            return std::make_unique<OwnedJob>(
                engine.begin(std::move(pieces), std::move(cut), eager));
          },
          py::arg("extents"), py::arg("spans"), py::arg("eager"), py::keep_alive<0, 1>())
      .def("close", &Engine::close, py::call_guard<py::gil_scoped_release>());

  bind_objects(module);

  module.def(
      "restore",
      [](const std::vector<std::pair<std::string, std::uint64_t>>& packs,
         const Rows<ChunkRow>& chunks, const Rows<Target>& targets, unsigned threads,
         const std::vector<std::string>& zstd, const Streams& streams,
         const std::shared_ptr<Engine>& engine) {
        const std::vector<PackFile> files = to_packs(packs);
        const std::vector<StoredChunk> table = to_chunks(chunks);
        const std::vector<Target> places = to_vector(targets);
        run_interruptibly([&] {
          return restore(files, table, places, threads, open_zstd(zstd), streams,
                         engine == nullptr ? nullptr : engine->staging(), signal_pending);
        });
      },
      py::kw_only(), py::arg("packs"), py::arg("chunks"), py::arg("targets"), py::arg("threads"),
      py::arg("zstd"), py::arg("streams") = Streams(), py::arg("engine") = nullptr);
  module.def(
      "verify",
      [](const std::vector<std::pair<std::string, std::uint64_t>>& packs,
         const Rows<ChunkRow>& chunks, unsigned threads, const std::vector<std::string>& zstd) {
        const std::vector<PackFile> files = to_packs(packs);
        const std::vector<StoredChunk> table = to_chunks(chunks);
        bool interrupted = false;
        std::vector<std::tuple<std::size_t, std::string, int>> found;
        {
          py::gil_scoped_release release;
          auto poll = [&] { return interrupted = signal_pending(); };
          for (const Damage& damage : verify(files, table, threads, open_zstd(zstd), poll))
            found.emplace_back(damage.chunk, damage.what, damage.error_number);
        }
        if (interrupted) throw py::error_already_set();
        return found;
      },
      py::kw_only(), py::arg("packs"), py::arg("chunks"), py::arg("threads"), py::arg("zstd"));
  module.def(
      "digest",
      [](const py::buffer& data) {
        const ByteView bytes(data, false);
        Digest digest;
        {
          py::gil_scoped_release release;
          digest = xxh3_128(bytes.data, bytes.size);
        }
        return to_hex(digest);
      },
      py::arg("data"));
  py::class_<Coder>(module, "Coder")
      .def(py::init([](const std::string& codec, const std::vector<std::string>& zstd) {
             const Effort effort =
                 codec_named(codec) == Codec::kSmall ? Effort::kSmall : Effort::kFast;
             const std::shared_ptr<const Zstd> library = open_zstd(zstd);
             return std::make_unique<Coder>(
                 Coder{PlanesEncoder(library, effort), PlanesDecoder(library)});
           }),
           py::kw_only(), py::arg("codec"), py::arg("zstd"))
      .def(
          "encode",
          [](Coder& coder, unsigned element, const py::buffer& raw, const py::buffer& out) {
            const ByteView from(raw, false), to(out, true);
            const Element type = checked_element(element);
            if (from.size % element_width(type) != 0 || to.size < from.size)
              throw Error(ErrorKind::kInvalid, "these bytes cannot be encoded into this buffer");
            py::gil_scoped_release release;
            return coder.encoder.encode(type, from.data, from.size, to.data);
          },
          py::arg("element"), py::arg("raw"), py::arg("out"))
      .def(
          "decode",
          [](Coder& coder, unsigned element, const py::buffer& encoded, const py::buffer& out) {
            const ByteView from(encoded, false), to(out, true);
            const Element type = checked_element(element);
            py::gil_scoped_release release;
            return coder.decoder.decode(type, from.data, from.size, to.data, to.size);
          },
          py::arg("element"), py::arg("encoded"), py::arg("out"));
  module.def(
      "has_zstd", [](const std::vector<std::string>& names) { return open_zstd(names) != nullptr; },
      py::arg("names"));
  module.def(
      "call_in_main_thread",
      [](py::function call) {
        PyObject* argument = call.release().ptr();
        const auto run = [](void* pointer) {
          const py::object owned =
              py::reinterpret_steal<py::object>(static_cast<PyObject*>(pointer));
          try {
            owned();
            return 0;
          } catch (py::error_already_set& error) {
            error.restore();
            return -1;
          }
        };
        if (Py_AddPendingCall(run, argument) == 0) return true;
        Py_DECREF(argument);
        return false;
      },
      py::arg("call"));
  module.def(
      "write_file",
      [](const std::string& path, const py::buffer& data) {
        const ByteView bytes(data, false);
        py::gil_scoped_release release;
        File::write_whole(path, bytes.data, bytes.size);
      },
      py::arg("path"), py::arg("data"));
  module.def("sync_directory", &File::sync_directory, py::arg("path"),
             py::call_guard<py::gil_scoped_release>());
  module.def("cuda_unavailable", &cuda_unavailable, py::call_guard<py::gil_scoped_release>());
  module.def("trace", &trace::enable, py::arg("on"));
  module.def("take_spans", [] {
    const trace::Taken taken = trace::take();
    std::vector<std::pair<std::uint32_t, std::string>> threads;
    for (const trace::Thread& thread : taken.threads) threads.emplace_back(thread.id, thread.name);
    Rows<trace::Span> spans(static_cast<py::ssize_t>(taken.spans.size()));
    std::copy(taken.spans.begin(), taken.spans.end(), spans.mutable_data());
    return py::make_tuple(spans, threads, taken.dropped);
  });
  module.def("available_processors", &available_processors);
  module.def("simd_path", [] { return simd_path_name(best_simd_path()); });
}
