/* Loops over independent tasks on several threads.
 *
 * A task writes only what is its own, so that results cannot depend on the number of threads or on who ran what.
 */
#ifndef DSA_CPU_PARALLEL_H_
#define DSA_CPU_PARALLEL_H_

#include <omp.h>
#include <stdint.h>

#include "dsa/common.h"

namespace dsa {

/* Threads an op may use: options->num_threads, or every processor the process may run on; never more than
 * DSA_MAX_THREADS, which bounds the workspaces. The environment variable OMP_NUM_THREADS is not asked: Paddle sets it
 * to 1 when it is imported. */
static inline int32_t thread_count(const dsa_cpu_options* options) {
    const int32_t threads = options->num_threads > 0 ? options->num_threads : omp_get_num_procs();
    return threads < DSA_MAX_THREADS ? threads : (int32_t)DSA_MAX_THREADS;
}

/* Threads worth using for work of about this long on one of them. A parallel region ends only when each of its threads
 * has been scheduled: microseconds on an idle machine, milliseconds on a busy one. */
static inline int32_t threads_for(double nanoseconds, const dsa_cpu_options* options) {
    constexpr double kWorthOneThread = 150e3;
    const int32_t most = thread_count(options);
    const double worth = nanoseconds / kWorthOneThread;
    return worth < 1 ? 1 : worth < most ? (int32_t)worth : most;
}

/* Calls body(task, thread) once for every task in [0, num_tasks); thread < num_threads. */
template <typename Body>
static inline void parallel_for(int64_t num_tasks, int32_t num_threads, const Body& body) {
    const int32_t threads = num_tasks < num_threads ? (int32_t)num_tasks : num_threads;
    if (threads <= 1) { /* entering a parallel region costs microseconds */
        for (int64_t task = 0; task < num_tasks; ++task) body(task, 0);
        return;
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t task = 0; task < num_tasks; ++task) body(task, omp_get_thread_num());
}

}  // namespace dsa

#endif /* DSA_CPU_PARALLEL_H_ */
