/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Room in a real tmpfs, of a size of its own where this user may mount one. */
#include "check.h"
#include "tmpfs.h"

#include <fcntl.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <unistd.h>

static const uint64_t MIB = 1 << 20;
static struct ram_layout layout;

static struct ram_block block_in(int fd, uint64_t start, uint64_t size)
{
	return (struct ram_block){ .host = { start, start + size }, .tmpfs = true, .fd = fd };
}

static void what_is_absent_is_held_against_what_is_left(void)
{
	char dir[] = "/tmp/ramlock-tmpfs-XXXXXX", name[64];
	struct tmpfs_room room;
	int one, other;

	CHECK(mkdtemp(dir) != NULL);
	if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) ||
	    mount("ramlock-test", dir, "tmpfs", 0, "size=16m")) {
		fprintf(stderr, "this user may not mount: not tested\n");
		rmdir(dir);
		return;
	}
	snprintf(name, sizeof(name), "%s/one", dir);
	one = open(name, O_RDWR | O_CREAT, 0600);
	snprintf(name, sizeof(name), "%s/other", dir);
	other = open(name, O_RDWR | O_CREAT, 0600);
	CHECK(!ftruncate(one, 64 * (off_t)MIB) && !ftruncate(other, 8 * (off_t)MIB));
	CHECK(!fallocate(one, 0, 0, 4 * (off_t)MIB));
	layout.v[0] = block_in(one, 0, 64 * MIB);
	layout.v[1] = block_in(other, 128 * MIB, 8 * MIB);
	layout.v[2] = (struct ram_block){ .host = { 256 * MIB, 512 * MIB } }; /* of no file */
	layout.n = 3;
	room = tmpfs_ask(&layout, &layout.v[1]);
	CHECK_EQ(room.left, 12 * MIB);
	CHECK_EQ(room.absent, (60 + 8) * MIB);
	/* Two plugged parts of one device need no more than they are. */
	layout.v[0] = block_in(one, 0, 2 * MIB);
	layout.v[2] = block_in(one, 32 * MIB, 3 * MIB);
	room = tmpfs_ask(&layout, &layout.v[0]);
	CHECK_EQ(room.absent, (5 + 8) * MIB);
	close(one);
	close(other);
	umount(dir);
	rmdir(dir);
}

static void without_a_limit_there_is_room(void)
{
	int fd = memfd_create("ram", MFD_CLOEXEC);

	CHECK(!ftruncate(fd, 64 * (off_t)MIB));
	layout.v[0] = block_in(fd, 0, 64 * MIB);
	layout.n = 1;
	CHECK_EQ(tmpfs_ask(&layout, &layout.v[0]).left, UINT64_MAX);
	CHECK_EQ(tmpfs_ask(&layout, NULL).left, UINT64_MAX);
	layout.v[0].fd = -1;
	CHECK_EQ(tmpfs_ask(&layout, &layout.v[0]).left, UINT64_MAX);
	close(fd);
}

CHECK_MAIN(CASE(what_is_absent_is_held_against_what_is_left), CASE(without_a_limit_there_is_room))
