/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the shim knows of QEMU's virtio-mem devices. All but the first: bottom half only. */
#ifndef RAMLOCK_VIRTIO_MEM_H
#define RAMLOCK_VIRTIO_MEM_H

#include "backends.h"
#include "plugged.h"

/* Looks up QEMU's symbols. Calls nothing of QEMU. */
void virtio_mem_init(void);

/* Whether @object is a virtio-mem device. */
bool virtio_mem_is(void *object);

/*
 * Lists the plugged parts of the virtio-mem device of @e; @others are memory regions of other RAM. *@may_lock says whether they
 * may be locked now. Returns 0, or -ENOTSUP when this QEMU is not as it should be.
 */
int virtio_mem_list(const struct backend *e, void *const others[], size_t n_others, struct plugged *p, bool *may_lock);

/*
 * Nothing of @device, which may not be locked, is locked any more: has the guest ask again at once, if it has not been told already. It would wait
 * for 50 s and more.
 */
void virtio_mem_nudge(void *device);

#endif
