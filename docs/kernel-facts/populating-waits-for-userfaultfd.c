/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Populating memory whose missing pages a userfaultfd supplies waits for its handler, as long as that takes. During an incoming
 * postcopy migration QEMU is that handler, so nothing may be populated then.
 */
#include "fact.h"
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>

static atomic_bool returned;

static void *populate(void *mem)
{
	returned = madvise(mem, PAGE, MADV_POPULATE_WRITE) == 0;
	return NULL;
}

int main(void)
{
	struct uffdio_api api = { .api = UFFD_API };
	char *mem = memory(PAGE);
	struct uffdio_register range = { .range = { (uintptr_t)mem, PAGE }, .mode = UFFDIO_REGISTER_MODE_MISSING };
	struct uffdio_zeropage answer = { .range = { (uintptr_t)mem, PAGE } };
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	struct uffd_msg message = { 0 };
	pthread_t thread;

	if (fd < 0 || ioctl(fd, UFFDIO_API, &api) || ioctl(fd, UFFDIO_REGISTER, &range))
		cannot_ask("no userfaultfd for us");
	pthread_create(&thread, NULL, populate, mem);
	for (int i = 0; i < 1000 && read(fd, &message, sizeof(message)) != sizeof(message); i++)
		usleep(10000);
	see(message.event == UFFD_EVENT_PAGEFAULT, "the handler is asked for the page");
	usleep(200000);
	see(!returned, "the call has not returned 200 ms later");
	if (ioctl(fd, UFFDIO_ZEROPAGE, &answer))
		broken("UFFDIO_ZEROPAGE");
	pthread_join(thread, NULL);
	see(returned, "it returns when the page is supplied");
	return verdict();
}
