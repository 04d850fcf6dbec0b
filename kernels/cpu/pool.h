/* Threads of our own, for callers that bring none. */
#ifndef PAREDOWN_POOL_H
#define PAREDOWN_POOL_H

#include "paredown.h"

namespace paredown {

/* Run `count` tasks on up to `threads` threads, the caller's among them; one call at a time, others run alone. */
void run_in_pool(int32_t threads, paredown_task task, void *argument, size_t count);

}  // namespace paredown

#endif
