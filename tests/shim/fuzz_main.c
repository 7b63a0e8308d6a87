/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Runs a fuzzed parser without libFuzzer: over the files of a folder, and over RUNS inputs that are made of them by chance,
 * always the same ones. Usage: NAME FOLDER RUNS. The input that fails is left in build/fuzz-failed.
 */
#include "fuzz.h"

#include <dirent.h>
#include <limits.h>

enum { FILES_MAX = 1024, INPUT_MAX = 1 << 18, CHANGED_MAX = 4096 };

static struct {
	uint8_t *bytes;
	size_t size;
} files[FILES_MAX];
static size_t n_files;

static void load(const char *folder)
{
	struct dirent **names;
	int n = scandir(folder, &names, NULL, alphasort);

	must(n >= 0);
	for (int i = 0; i < n; i++) {
		char path[PATH_MAX];
		FILE *f;

		snprintf(path, sizeof(path), "%s/%s", folder, names[i]->d_name);
		f = names[i]->d_name[0] != '.' ? fopen(path, "rb") : NULL;
		if (f) {
			must(n_files < FILES_MAX);
			files[n_files].bytes = malloc(INPUT_MAX);
			must(files[n_files].bytes != NULL);
			files[n_files].size = fread(files[n_files].bytes, 1, INPUT_MAX, f);
			n_files++;
			fclose(f);
		}
		free(names[i]);
	}
	free(names);
}

static void run(const uint8_t *bytes, size_t size)
{
	/* On the heap, and no larger than it is, so that the sanitizer sees each byte too many. */
	uint8_t *copy = malloc(size ? size : 1);
	FILE *f = fopen("build/fuzz-failed", "wb");

	must(copy && f);
	memcpy(copy, bytes, size);
	must(fwrite(bytes, 1, size, f) == size && !fclose(f));
	LLVMFuzzerTestOneInput(copy, size);
	free(copy);
}

static size_t below(size_t n)
{
	return n ? (size_t)rand() % n : 0;
}

/* Copies some bytes of a file into @input, over others or between them. */
static size_t splice(uint8_t *input, size_t size)
{
	size_t from = below(n_files), at = below(size + 1), start = below(files[from].size);
	size_t n = below(files[from].size - start < 64 ? files[from].size - start + 1 : 64);

	if (at + n > CHANGED_MAX || size + n > CHANGED_MAX)
		return size;
	if (rand() % 2) {
		memmove(input + at + n, input + at, size - at);
		size += n;
	} else if (at + n > size) {
		size = at + n;
	}
	memcpy(input + at, files[from].bytes + start, n);
	return size;
}

static size_t change(uint8_t *input, size_t size)
{
	size_t at = below(size), n = below(8);

	switch (rand() % 4) {
	case 0:
		if (size)
			input[at] ^= (uint8_t)(1 << below(8));
		return size;
	case 1:
		if (size)
			input[at] = (uint8_t)rand();
		return size;
	case 2:
		if (at + n > size)
			return at;
		memmove(input + at, input + at + n, size - at - n);
		return size - n;
	default:
		return splice(input, size);
	}
}

int main(int argc, char **argv)
{
	static uint8_t input[CHANGED_MAX];
	long runs = argc > 2 ? strtol(argv[2], NULL, 10) : 0;

	must(argc > 1);
	load(argv[1]);
	must(n_files > 0);
	for (size_t i = 0; i < n_files; i++)
		run(files[i].bytes, files[i].size);
	srand(1);
	for (long i = 0; i < runs; i++) {
		size_t from = below(n_files), size = files[from].size < sizeof(input) ? files[from].size : sizeof(input);

		memcpy(input, files[from].bytes, size);
		for (size_t n = 1 + below(8); n; n--)
			size = change(input, size);
		run(input, size);
	}
	remove("build/fuzz-failed");
	printf("%s: %zu files and %ld inputs made of them\n", argv[0], n_files, runs);
	for (size_t i = 0; i < n_files; i++)
		free(files[i].bytes);
	return 0;
}
