/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The injected bootstrap: loads the shim into a running QEMU and goes on as if nothing had happened.
 *
 * Theory of operation: the controller stops QEMU's main thread while it is parked in ppoll(), writes this code into the
 * unused end of an executable mapping, writes `struct bootstrap` below the thread's stack pointer, and sets rip to
 * this code and rsp to that struct. Then it lets go, and is not needed any more: this code saves every register and
 * the whole extended state, loads the shim, starts it, restores everything and issues the interrupted system call again.
 * The kernel has written the time that was left into ppoll()'s timeout, so that it ends when it should.
 *
 * It is position independent, calls only through addresses in the struct, and writes nothing but the stack. At entry
 * all registers but rip, rsp and orig_rax are those of the interrupted system call; rcx and r11 are free, since every
 * `syscall` instruction changes them.
 *
 * struct bootstrap, 64-byte aligned; injector/ramlock/x86_64.py builds it:
 */
#define DLOPEN		0	/* void *(*)(const char *, int) */
#define DLSYM		8	/* void *(*)(void *, const char *) */
#define ERRNO		16	/* int *(*)(void): __errno_location */
#define PATH		24	/* const char *: the shim */
#define SYMBOL		32	/* const char *: "ramlock_start" */
#define CONFIG		40	/* const char *: for ramlock_start() */
#define XSAVE		48	/* 64-byte aligned area, as large as CPUID says */
#define RETURN_RIP	56	/* the address of the interrupted `syscall` instruction */
#define RETURN_RSP	64
#define RETURN_RAX	72	/* the number of the interrupted system call */
#define ALL_SIGNALS	80	/* a full signal mask */
#define OLD_SIGNALS	88	/* out: the thread's own mask */
#define OLD_ERRNO	96	/* out */

#define SYS_rt_sigprocmask 14
#define SIG_SETMASK 2
#define RTLD_NOW 2
#define PUSHED 128		/* flags and 15 registers */

	.section .ramlock.trampoline, "ax", @progbits
	.balign 16
	.globl ramlock_trampoline
	.hidden ramlock_trampoline
	.type ramlock_trampoline, @function
ramlock_trampoline:
	pushfq
	pushq %rax
	pushq %rbx
	pushq %rcx
	pushq %rdx
	pushq %rsi
	pushq %rdi
	pushq %rbp
	pushq %r8
	pushq %r9
	pushq %r10
	pushq %r11
	pushq %r12
	pushq %r13
	pushq %r14
	pushq %r15
	cld
	leaq PUSHED(%rsp), %rbx

	/* No signal handler may run between here and the end: it would find a thread that is not where it thinks. */
	movl $SYS_rt_sigprocmask, %eax
	movl $SIG_SETMASK, %edi
	leaq ALL_SIGNALS(%rbx), %rsi
	leaq OLD_SIGNALS(%rbx), %rdx
	movl $8, %r10d
	syscall

	/* The header of the area must be zero; XSAVE writes only its first field. */
	movq XSAVE(%rbx), %rdi
	addq $512, %rdi
	xorl %eax, %eax
	movl $8, %ecx
	rep stosq
	movq XSAVE(%rbx), %rdi
	movl $-1, %eax
	movl $-1, %edx
	xsave64 (%rdi)

	call *ERRNO(%rbx)
	movl (%rax), %ecx
	movl %ecx, OLD_ERRNO(%rbx)

	movq PATH(%rbx), %rdi
	movl $RTLD_NOW, %esi
	call *DLOPEN(%rbx)
	testq %rax, %rax
	jz 1f
	movq %rax, %rdi
	movq SYMBOL(%rbx), %rsi
	call *DLSYM(%rbx)
	testq %rax, %rax
	jz 1f
	movq CONFIG(%rbx), %rdi
	call *%rax

	/* What came of it the controller sees by itself, in the loader's list and in the threads. */
1:	call *ERRNO(%rbx)
	movl OLD_ERRNO(%rbx), %ecx
	movl %ecx, (%rax)

	movq XSAVE(%rbx), %rdi
	movl $-1, %eax
	movl $-1, %edx
	xrstor64 (%rdi)

	movl $SYS_rt_sigprocmask, %eax
	movl $SIG_SETMASK, %edi
	leaq OLD_SIGNALS(%rbx), %rsi
	xorl %edx, %edx
	movl $8, %r10d
	syscall

	popq %r15
	popq %r14
	popq %r13
	popq %r12
	popq %r11
	popq %r10
	popq %r9
	popq %r8
	popq %rbp
	popq %rdi
	popq %rsi
	popq %rdx
	popq %rcx
	popq %rbx
	popq %rax
	popfq
	movq RETURN_RIP(%rsp), %rcx
	movq RETURN_RAX(%rsp), %rax
	movq RETURN_RSP(%rsp), %rsp
	jmp *%rcx
	.globl ramlock_trampoline_end
	.hidden ramlock_trampoline_end
ramlock_trampoline_end:
	.size ramlock_trampoline, . - ramlock_trampoline

/*
 * The smaller detour: makes a memory file, for a target that cannot see the shim's own file. It is written, entered and
 * left as the code above is, with rsp at `struct memfd_call`; the controller finds the file under /proc/PID/fd by its
 * name and fills it from outside. A system call changes no register but rax, rcx and r11, so that there is little to save,
 * and a signal handler that runs in between harms nothing: all of ours is above rsp.
 *
 * struct memfd_call, 16-byte aligned:
 */
#define MEMFD_RIP	0	/* the address of the interrupted `syscall` instruction */
#define MEMFD_RSP	8
#define MEMFD_RAX	16	/* the number of the interrupted system call */
#define MEMFD_FLAGS	24
#define MEMFD_NAME	32	/* the name itself */

#define SYS_memfd_create 319

	.section .ramlock.memfd, "ax", @progbits
	.balign 16
	.globl ramlock_memfd
	.hidden ramlock_memfd
	.type ramlock_memfd, @function
ramlock_memfd:
	pushq %rdi
	pushq %rsi
	movl $SYS_memfd_create, %eax
	leaq 16 + MEMFD_NAME(%rsp), %rdi
	movl 16 + MEMFD_FLAGS(%rsp), %esi
	syscall
	popq %rsi
	popq %rdi
	movq MEMFD_RIP(%rsp), %rcx
	movq MEMFD_RAX(%rsp), %rax
	movq MEMFD_RSP(%rsp), %rsp
	jmp *%rcx
	.size ramlock_memfd, . - ramlock_memfd

	.section .note.GNU-stack, "", @progbits
