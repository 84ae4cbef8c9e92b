// The passes of the optimizers over weights and gradients, for the CPU. Plain C interface, no torch header: compiling
// takes two seconds. sutrain/optim/kernels/compiled.py builds the tables and calls; eager.py has the same mathematics
// in torch and is what this is tested against.
//
// Work is cut into chunks by the layout alone, every chunk leaves its own partial sums, and these are added up in
// order. So results are the same bits for any number of threads.
#include <cmath>
#include <cstdint>

#include "lines.h"

extern "C" {

// Σg² of every fragment ([F]), and row and column sums of g² added into row_sums and column_sums.
void square_sums(int64_t threads, const Fragment* fragments, const Chunk* chunks, int64_t chunk_count,
                 const Group* groups, int64_t group_count, const float* const* gradients, float* row_sums,
                 float* column_sums, float* partials, double* chunk_sums, double* result) {
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(dynamic)
  for (int64_t c = 0; c < chunk_count; ++c) {
    const Chunk& chunk = chunks[c];
    const Fragment& f = fragments[chunk.fragment];
    const float* gradient = gradients[chunk.fragment];
    double total = 0;
    if (f.kind == WHOLE) {
      total = sum_of_squares(gradient + chunk.begin, chunk.end - chunk.begin);
    } else {
      float* partial = chunk.partial < 0 ? nullptr : partials + chunk.partial;
      if (partial)
        for (int64_t k = 0; k < f.col_inner * f.line; ++k) partial[k] = 0;
      auto column_of = [&](const Line& l) { return partial ? partial + l.inside : column_sums + l.column; };
      auto one = [&](const Line& l) {
        const float* g = gradient + l.from;
        float *column = column_of(l), *row = row_sums + l.row;
        float sum = 0;
        if (f.kind == ROW_CONSTANT) {
#pragma omp simd reduction(+ : sum)
          for (int64_t k = 0; k < l.count; ++k) {
            const float square = g[k] * g[k];
            sum += square;
            column[k] += square;
          }
          *row += sum;
        } else {
#pragma omp simd reduction(+ : sum)
          for (int64_t k = 0; k < l.count; ++k) {
            const float square = g[k] * g[k];
            sum += square;
            column[k] += square;
            row[k] += square;
          }
        }
        total += sum;
      };
      auto four = [&](const Line& l) {
        const int64_t n = f.line;
        const float *g0 = gradient + l.from, *g1 = g0 + n, *g2 = g1 + n, *g3 = g2 + n;
        float *column = column_of(l), *row = row_sums + l.row;
        float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
        for (int64_t k = 0; k < n; ++k) {
          const float q0 = g0[k] * g0[k], q1 = g1[k] * g1[k], q2 = g2[k] * g2[k], q3 = g3[k] * g3[k];
          s0 += q0, s1 += q1, s2 += q2, s3 += q3;
          column[k] += (q0 + q1) + (q2 + q3);
        }
        row[0] += s0, row[1] += s1, row[2] += s2, row[3] += s3;
        total += static_cast<double>(s0) + s1 + s2 + s3;
      };
      for_each_line(f, chunk.begin, chunk.end, one, four);
    }
    chunk_sums[c] = total;
  }
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(dynamic)
  for (int64_t i = 0; i < group_count; ++i) {
    const Group& group = groups[i];
    float* column = column_sums + group.start;
    for (int64_t c = group.first_chunk; c < group.last_chunk; ++c) {
      const float* partial = partials + chunks[c].partial;
#pragma omp simd
      for (int64_t k = 0; k < group.columns; ++k) column[k] += partial[k];
    }
  }
  add_up(chunks, chunk_count, 1, chunk_sums, result);
}

// 1/√V = row_factor · column_factor from row and column means: row_factor = (R / max(mean R, floor))^-1/2,
// column_factor = C^-1/2, for the tensors of all fragments.
void factors(int64_t threads, const Fragment* fragments, int64_t fragment_count, const float* row_mean,
             const float* column_mean, float floor, float* row_factor, float* column_factor) {
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(dynamic)
  for (int64_t i = 0; i < fragment_count; ++i) {
    const Fragment& f = fragments[i];
    if (f.kind == WHOLE) continue;
    const int64_t slab = f.mean_extent * f.mean_inner;
    for (int64_t outer = 0; outer < f.row_count; outer += slab)
      for (int64_t inner = 0; inner < f.mean_inner; ++inner) {
        const int64_t first = f.row_start + outer + inner;
        double sum = 0;
        for (int64_t n = 0; n < f.mean_extent; ++n) sum += row_mean[first + n * f.mean_inner];
        const float average = static_cast<float>(sum / f.mean_extent), mean = average < floor ? floor : average;
        for (int64_t n = 0; n < f.mean_extent; ++n) {
          const int64_t at = first + n * f.mean_inner;
          row_factor[at] = 1.0f / std::sqrt(row_mean[at] / mean);
        }
      }
    const int64_t end = f.col_start + f.col_count;
    for (int64_t k = f.col_start; k < end; ++k) column_factor[k] = 1.0f / std::sqrt(column_mean[k]);
  }
}

#define SIMD "omp simd reduction(+ : ww, uu, uw, mm, mu, mw)"
// With U = clip · g / √V and the old momentum m: Σθ², ΣU², ΣUθ, Σm², ΣmU, Σmθ of every fragment ([F, 6]). Advances the
// whole second moments (moments[f] where the kind is WHOLE). momenta may be null.
void adafactor_sums(int64_t threads, const Fragment* fragments, const Chunk* chunks, int64_t chunk_count,
                    const float* const* gradients, const float* const* weights, float* const* moments,
                    const float* const* momenta, const float* row_factor, const float* column_factor, float clip,
                    float new_share, float epsilon, float limit, double* chunk_sums, double* result) {
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(dynamic)
  for (int64_t c = 0; c < chunk_count; ++c) {
    const Chunk& chunk = chunks[c];
    const Fragment& f = fragments[chunk.fragment];
    const float *gradient = gradients[chunk.fragment], *weight = weights[chunk.fragment];
    const float* momentum = momenta ? momenta[chunk.fragment] : nullptr;
    double sums[6] = {0, 0, 0, 0, 0, 0};
    auto keep = [&](float ww, float uu, float uw, float mm, float mu, float mw) {
      sums[0] += ww, sums[1] += uu, sums[2] += uw, sums[3] += mm, sums[4] += mu, sums[5] += mw;
    };
    if (f.kind == WHOLE) {
      for_each_block(chunk.begin, chunk.end, [&](int64_t at, int64_t count) {
        const float *g = gradient + at, *w = weight + at, *m = momentum ? momentum + at : nullptr;
        float* v = moments[chunk.fragment] + at;
        float ww = 0, uu = 0, uw = 0, mm = 0, mu = 0, mw = 0;
#pragma omp simd reduction(+ : ww, uu, uw, mm, mu, mw)
        for (int64_t k = 0; k < count; ++k) {
          const float clipped = g[k] * clip;
          v[k] += new_share * (clipped * clipped + epsilon - v[k]);
          const float u = clipped * limited(1.0f / std::sqrt(v[k]), limit);
          ww += w[k] * w[k];
          uu += u * u;
          uw += u * w[k];
          if (m) mm += m[k] * m[k], mu += m[k] * u, mw += m[k] * w[k];
        }
        keep(ww, uu, uw, mm, mu, mw);
      });
    } else {
      auto one = [&](const Line& l) {
        const float *g = gradient + l.from, *w = weight + l.from, *m = momentum ? momentum + l.from : nullptr;
        float ww = 0, uu = 0, uw = 0, mm = 0, mu = 0, mw = 0;
        if (!m)
          OVER_LINE(f, l, row_factor, column_factor, limit, const float u = g[k] * clip * scale; ww += w[k] * w[k];
                    uu += u * u; uw += u * w[k];)
        else
          OVER_LINE(f, l, row_factor, column_factor, limit, const float u = g[k] * clip * scale; ww += w[k] * w[k];
                    uu += u * u; uw += u * w[k]; mm += m[k] * m[k]; mu += m[k] * u; mw += m[k] * w[k];)
        keep(ww, uu, uw, mm, mu, mw);
      };
      auto four = [&](const Line& l) {
        if (momentum) {
          Line next = l;
          for (int64_t i = 0; i < LINES; ++i, next.from += f.line, ++next.row) one(next);
          return;
        }
        const int64_t n = f.line;
        const float *g0 = gradient + l.from, *g1 = g0 + n, *g2 = g1 + n, *g3 = g2 + n;
        const float *w0 = weight + l.from, *w1 = w0 + n, *w2 = w1 + n, *w3 = w2 + n;
        const float *column = column_factor + l.column, *row = row_factor + l.row;
        const float r0 = row[0], r1 = row[1], r2 = row[2], r3 = row[3];
        float ww = 0, uu = 0, uw = 0;
#pragma omp simd reduction(+ : ww, uu, uw)
        for (int64_t k = 0; k < n; ++k) {
          const float v = column[k];
          const float u0 = g0[k] * clip * limited(r0 * v, limit), u1 = g1[k] * clip * limited(r1 * v, limit);
          const float u2 = g2[k] * clip * limited(r2 * v, limit), u3 = g3[k] * clip * limited(r3 * v, limit);
          ww += (w0[k] * w0[k] + w1[k] * w1[k]) + (w2[k] * w2[k] + w3[k] * w3[k]);
          uu += (u0 * u0 + u1 * u1) + (u2 * u2 + u3 * u3);
          uw += (u0 * w0[k] + u1 * w1[k]) + (u2 * w2[k] + u3 * w3[k]);
        }
        keep(ww, uu, uw, 0, 0, 0);
      };
      for_each_line(f, chunk.begin, chunk.end, one, four);
    }
    for (int i = 0; i < 6; ++i) chunk_sums[6 * c + i] = sums[i];
  }
  add_up(chunks, chunk_count, 6, chunk_sums, result);
}
#undef SIMD

#define SIMD "omp simd"
// θ ← θ - lost · θ - size · (keep · m + share · U), and m ← keep · m + share · U where there is momentum; size, share
// and lost by tensor. (1 - lost is not formed: at lr · decay = 1e-6 it would round the decay by 3 %.)
void adafactor_apply(int64_t threads, const Fragment* fragments, const Chunk* chunks, int64_t chunk_count,
                     const float* const* gradients, float* const* weights, const float* const* moments,
                     float* const* momenta, const float* row_factor, const float* column_factor, float clip,
                     float limit, float keep, const float* sizes, const float* shares, const float* losses) {
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(dynamic)
  for (int64_t c = 0; c < chunk_count; ++c) {
    const Chunk& chunk = chunks[c];
    const Fragment& f = fragments[chunk.fragment];
    const float* gradient = gradients[chunk.fragment];
    float *weight = weights[chunk.fragment], *momentum = momenta ? momenta[chunk.fragment] : nullptr;
    const float size = sizes[f.tensor], share = shares[f.tensor] * clip, lost = losses[f.tensor];
    const float move = size * share;
    if (f.kind == WHOLE) {
      const float *g = gradient, *v = moments[chunk.fragment];
      if (momentum) {
#pragma omp simd
        for (int64_t k = chunk.begin; k < chunk.end; ++k) {
          momentum[k] = keep * momentum[k] + share * (g[k] * limited(1.0f / std::sqrt(v[k]), limit));
          weight[k] -= lost * weight[k] + size * momentum[k];
        }
      } else {
#pragma omp simd
        for (int64_t k = chunk.begin; k < chunk.end; ++k)
          weight[k] -= lost * weight[k] + move * (g[k] * limited(1.0f / std::sqrt(v[k]), limit));
      }
      continue;
    }
    auto one = [&](const Line& l) {
      const float* g = gradient + l.from;
      float* w = weight + l.from;
      if (momentum) {
        float* m = momentum + l.from;
        OVER_LINE(f, l, row_factor, column_factor, limit, m[k] = keep * m[k] + share * (g[k] * scale);
                  w[k] -= lost * w[k] + size * m[k];)
      } else {
        OVER_LINE(f, l, row_factor, column_factor, limit, w[k] -= lost * w[k] + move * (g[k] * scale);)
      }
    };
    auto four = [&](const Line& l) {  // one by one: writing to four places at once is slower
      Line next = l;
      for (int64_t i = 0; i < LINES; ++i, next.from += f.line, ++next.row) one(next);
    };
    for_each_line(f, chunk.begin, chunk.end, one, four);
  }
}
#undef SIMD

// LAMB and AdamW: m ← m + new1 (g - m), v ← β2 v + new2 g² of clipped gradients, and for the direction
// r = m · mean_scale / (√v · root_scale + ε) + decay · θ: Σθ², Σr², Σrθ of every fragment ([F, 3]); decay by tensor.
void moment_sums(int64_t threads, const Fragment* fragments, const Chunk* chunks, int64_t chunk_count,
                 const float* const* gradients, const float* const* weights, float* const* means,
                 float* const* squares, float clip, float new1, float beta2, float new2, float mean_scale,
                 float root_scale, float epsilon, const float* decays, double* chunk_sums, double* result) {
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(dynamic)
  for (int64_t c = 0; c < chunk_count; ++c) {
    const Chunk& chunk = chunks[c];
    const float *g = gradients[chunk.fragment], *w = weights[chunk.fragment];
    float *m = means[chunk.fragment], *v = squares[chunk.fragment];
    const float decay = decays[fragments[chunk.fragment].tensor];
    double weight = 0, direction = 0, aligned = 0;
    for_each_block(chunk.begin, chunk.end, [&](int64_t at, int64_t count) {
      float ww = 0, rr = 0, rw = 0;
#pragma omp simd reduction(+ : ww, rr, rw)
      for (int64_t k = at; k < at + count; ++k) {
        const float clipped = g[k] * clip;
        m[k] += new1 * (clipped - m[k]);
        v[k] = v[k] * beta2 + new2 * clipped * clipped;
        const float r = m[k] * mean_scale / (std::sqrt(v[k]) * root_scale + epsilon) + decay * w[k];
        ww += w[k] * w[k];
        rr += r * r;
        rw += r * w[k];
      }
      weight += ww, direction += rr, aligned += rw;
    });
    chunk_sums[3 * c] = weight, chunk_sums[3 * c + 1] = direction, chunk_sums[3 * c + 2] = aligned;
  }
  add_up(chunks, chunk_count, 3, chunk_sums, result);
}

// θ ← θ - lost · θ - size · r, r as above from the moments as they are now.
void moment_apply(int64_t threads, const Fragment* fragments, const Chunk* chunks, int64_t chunk_count,
                  float* const* weights, const float* const* means, const float* const* squares, float mean_scale,
                  float root_scale, float epsilon, const float* decays, const float* sizes, const float* losses) {
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(dynamic)
  for (int64_t c = 0; c < chunk_count; ++c) {
    const Chunk& chunk = chunks[c];
    float* w = weights[chunk.fragment];
    const float *m = means[chunk.fragment], *v = squares[chunk.fragment];
    const int64_t tensor = fragments[chunk.fragment].tensor;
    const float size = sizes[tensor], lost = losses[tensor], decay = decays[tensor];
#pragma omp simd
    for (int64_t k = chunk.begin; k < chunk.end; ++k) {
      const float r = m[k] * mean_scale / (std::sqrt(v[k]) * root_scale + epsilon) + decay * w[k];
      w[k] -= lost * w[k] + size * r;
    }
  }
}

}  // extern "C"
