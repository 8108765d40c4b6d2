// BiWKV on the CPU: forward and backward as operators of the library `lalic_cpu`. The schema that users see,
// lalic::biwkv, its autograd and its checks in Python are in lalic/ops.py; the arithmetic is in biwkv_strip.h.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "biwkv_check.h"
#include "biwkv_strip.h"

namespace {

using at::Tensor;
using lalic::Chunk;
using lalic::Strip;
using lalic::View;

void check(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v) {
  TORCH_CHECK(k.is_cpu(), "biwkv: the CPU kernel takes CPU tensors, not ", k.device());
  TORCH_CHECK(k.scalar_type() == at::kFloat || k.scalar_type() == at::kDouble,
              "biwkv: the CPU kernel takes float32 and float64, not ", k.scalar_type());
  lalic::check_inputs(w, u, k, v, k.scalar_type());
}

template <class T>
View<const T> input(const Tensor& x) {
  return {x.const_data_ptr<T>(), x.stride(0), x.stride(1), x.stride(2)};
}

template <class T>
View<T> result(const Tensor& x) {
  return {x.mutable_data_ptr<T>(), x.stride(0), x.stride(1), x.stride(2)};
}

// The strips of one call, and how the threads share them.
template <class T>
class Plan {
  static constexpr int64_t kLanes = lalic::Lanes<T>::count;
  static constexpr int64_t kGroup = 8;    // blocks of channels that a thread takes together
  static constexpr int64_t kRange = 8;  // chunks that one thread takes at a time when strips are cut

 public:
  Plan(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v)
      : w_(w.contiguous()), u_(u.contiguous()),
        problem_{k.size(0), k.size(1), k.size(2), w_.const_data_ptr<T>(), u_.const_data_ptr<T>(), input<T>(k),
                 input<T>(v)},
        samples_(k.size(0)), blocks_(divide(problem_.channels, kLanes)),
        chunks_(divide(problem_.tokens, lalic::kChunk)),
        workspace_(at::empty({samples_ * blocks_ * chunks_ * int64_t(sizeof(Chunk<T>))}, at::kByte)) {
    // A thread takes neighbouring blocks of channels together, because memory wants to be read in sequence: as
    // few groups of at most kGroup as give every thread the same work, or so many that it does not matter.
    const int64_t threads = at::get_num_threads();
    const auto even = [&] { return samples_ * groups_ % threads == 0 || samples_ * groups_ >= 4 * threads; };
    for (groups_ = divide(blocks_, kGroup); groups_ < blocks_ && !even();) ++groups_;
    whole_ = chunks_ == 1 || even();
    if (!whole_) groups_ = divide(blocks_, kGroup);
  }

  // Whether every thread has whole strips to do: then these go through all steps, while they are in the cache.
  // Otherwise the steps are run one after the other, by `for_chunks` and `for_strips`.
  bool whole_strips() const { return whole_; }

  // function(strips), for groups of strips that together hold every strip once.
  template <class Function>
  void for_strips(const Function& function) const {
    at::parallel_for(0, samples_ * groups_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) function(strips(i / groups_, i % groups_));
    });
  }

  // function(strip, chunk, next chunk), for every chunk of every strip; from the last one to the first if `down`.
  template <class Function>
  void for_chunks(bool down, const Function& function) const {
    const int64_t ranges = divide(chunks_, kRange);
    at::parallel_for(0, samples_ * ranges * groups_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        auto some = strips(i / (ranges * groups_), i % groups_);
        const int64_t range = i / groups_ % ranges;
        walk(some, range * kRange, std::min(chunks_, (range + 1) * kRange), down, function);
      }
    });
  }

  template <class Function>
  static void walk(std::vector<Strip<T>>& strips, int64_t first, int64_t last, bool down, const Function& function) {
    for (int64_t i = 0; i < last - first; ++i) {
      const int64_t c = down ? last - 1 - i : first + i, next = down ? c - 1 : c + 1;
      for (auto& strip : strips) function(strip, c, next);
    }
  }

 private:
  static int64_t divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

  std::vector<Strip<T>> strips(int64_t sample, int64_t group) const {
    const int64_t first = group * blocks_ / groups_, last = (group + 1) * blocks_ / groups_;
    auto* chunks = reinterpret_cast<Chunk<T>*>(workspace_.mutable_data_ptr<uint8_t>());
    std::vector<Strip<T>> out;
    out.reserve(last - first);
    for (int64_t block = first; block < last; ++block) {
      out.emplace_back(problem_, sample, first * kLanes, last - first, block * kLanes,
                       chunks + (sample * blocks_ + block) * chunks_);
    }
    return out;
  }

  const Tensor w_, u_;
  const lalic::Problem<T> problem_;
  const int64_t samples_, blocks_, chunks_;
  const Tensor workspace_;
  int64_t groups_ = 1;
  bool whole_ = true;
};

// Runs `step` for all chunks of some strips.
template <class T, class Function>
void for_all(std::vector<Strip<T>>& strips, bool down, const Function& step) {
  Plan<T>::walk(strips, 0, strips[0].count(), down, step);
}

// Steps go through the chunks in turn upwards and downwards: what one touched last, the next finds in the cache.
template <class T>
void forward(const Plan<T>& plan, const View<T>& y) {
  const auto summarise = [](Strip<T>& strip, int64_t c, int64_t next) { strip.summarise(c, next); };
  const auto outputs = [&](Strip<T>& strip, int64_t c, int64_t next) { strip.outputs(c, next, y); };
  const auto connect = [](std::vector<Strip<T>> strips) {
    for (auto& strip : strips) strip.connect();
  };
  if (plan.whole_strips()) {
    return plan.for_strips([&](std::vector<Strip<T>> strips) {
      for_all(strips, false, summarise);
      connect(strips);
      for_all(strips, true, outputs);
    });
  }
  plan.for_chunks(false, summarise);
  plan.for_strips(connect);
  plan.for_chunks(true, outputs);
}

// gw, gu: (B, C), the sums over the tokens of each sample.
template <class T>
void backward(const Plan<T>& plan, const View<const T>& gy, const View<T>& gk, const View<T>& gv, double* gw,
              double* gu) {
  const auto summarise = [](Strip<T>& strip, int64_t c, int64_t next) { strip.summarise(c, next); };
  const auto sums = [&](Strip<T>& strip, int64_t c, int64_t next) { strip.gradient_sums(c, next, gy); };
  const auto gradients = [&](Strip<T>& strip, int64_t c, int64_t next) { strip.gradients(c, next, gy, gk, gv); };
  const auto connect = [](std::vector<Strip<T>> strips) {
    for (auto& strip : strips) strip.connect();
  };
  const auto connect_gradients = [](std::vector<Strip<T>> strips) {
    for (auto& strip : strips) strip.connect_gradients();
  };
  const auto reduce = [&](std::vector<Strip<T>> strips) {
    for (auto& strip : strips) strip.reduce(gw, gu);
  };
  if (plan.whole_strips()) {
    return plan.for_strips([&](std::vector<Strip<T>> strips) {
      for_all(strips, false, summarise);
      connect(strips);
      for_all(strips, true, sums);
      connect_gradients(strips);
      for_all(strips, false, gradients);
      reduce(strips);
    });
  }
  plan.for_chunks(false, summarise);
  plan.for_strips(connect);
  plan.for_chunks(true, sums);
  plan.for_strips(connect_gradients);
  plan.for_chunks(false, gradients);
  plan.for_strips(reduce);
}

template <class T>
Tensor run_forward(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v) {
  Tensor y = at::empty(v.sizes(), v.options());
  if (y.numel() > 0) forward(Plan<T>(w, u, k, v), result<T>(y));
  return y;
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> run_backward(const Tensor& gy, const Tensor& w, const Tensor& u,
                                                        const Tensor& k, const Tensor& v) {
  const int64_t samples = k.size(0), channels = k.size(2);
  Tensor gw = at::empty(w.sizes(), w.options()), gu = at::empty(u.sizes(), u.options());
  Tensor gk = at::empty(k.sizes(), k.options()), gv = at::empty(v.sizes(), v.options());
  std::vector<double> sums_w(samples * channels), sums_u(samples * channels);
  if (samples > 0) {
    backward(Plan<T>(w, u, k, v), input<T>(gy), result<T>(gk), result<T>(gv), sums_w.data(), sums_u.data());
  }
  for (int64_t c = 0; c < channels; ++c) {
    double total_w = 0, total_u = 0;
    for (int64_t b = 0; b < samples; ++b) {
      total_w += sums_w[b * channels + c];
      total_u += sums_u[b * channels + c];
    }
    gw.mutable_data_ptr<T>()[c] = T(total_w);
    gu.mutable_data_ptr<T>()[c] = T(total_u);
  }
  return {gw, gu, gk, gv};
}

Tensor biwkv(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v) {
  check(w, u, k, v);
  return k.scalar_type() == at::kFloat ? run_forward<float>(w, u, k, v) : run_forward<double>(w, u, k, v);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> biwkv_backward(const Tensor& gy, const Tensor& w, const Tensor& u,
                                                          const Tensor& k, const Tensor& v) {
  check(w, u, k, v);
  lalic::check_gradient(gy, v);
  return k.scalar_type() == at::kFloat ? run_backward<float>(gy, w, u, k, v)
                                       : run_backward<double>(gy, w, u, k, v);
}

}  // namespace

TORCH_LIBRARY(lalic_cpu, m) {
  m.def("biwkv(Tensor w, Tensor u, Tensor k, Tensor v) -> Tensor");
  m.def("biwkv_backward(Tensor gy, Tensor w, Tensor u, Tensor k, Tensor v) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(lalic_cpu, CPU, m) {
  m.impl("biwkv", &biwkv);
  m.impl("biwkv_backward", &biwkv_backward);
}
