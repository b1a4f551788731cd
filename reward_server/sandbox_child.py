"""The inside of reward_server/sandbox.py: makes the sandbox around itself, then runs what comes through a pipe.

Runs as a script under `python -I -S` with nothing but the standard library, so that nothing of ours is in its memory.
"""

import ctypes
import json
import os
import resource
import signal
import sys

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
RDONLY, NOSUID, NODEV, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
DETACH = 2
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_DUMPABLE = 1, 38, 4
SETUP_FAILED = 99

libc = ctypes.CDLL(None, use_errno=True)


def check(result, what):
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def mount(source, target, kind, flags, data=None):
    text = [x.encode() if x is not None else None for x in (source, target, kind)]
    check(libc.mount(*text, ctypes.c_ulong(flags), data.encode() if data else None), f"mount {target}")


def own_namespaces():
    """Unshare all but the user namespace as root, with it as anybody else."""
    flags = NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET
    uid, gid = os.getuid(), os.getgid()
    if uid == 0:
        check(libc.unshare(flags), "unshare")
        return
    check(libc.unshare(flags | NEWUSER), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {uid} 1"), ("gid_map", f"1000 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def own_root(folder, file_mb):
    """A root that holds the system's folders read-only and an empty /tmp, in the place of the old one."""
    mount(None, "/", None, REC | PRIVATE)
    mount("tmpfs", folder, "tmpfs", NOSUID | NODEV, f"size={file_mb}m,nr_inodes=1024,mode=755")
    wanted = ["/usr", "/lib", "/lib64", "/bin", sys.base_prefix]
    for place in wanted:
        target = folder + place
        if os.path.islink(place):
            os.symlink(os.readlink(place), target)
        elif os.path.isdir(place) and not any(place.startswith(other + "/") for other in wanted):
            os.makedirs(target, exist_ok=True)
            mount(place, target, None, BIND | REC)
            mount(None, target, None, BIND | REMOUNT | RDONLY | NOSUID | NODEV)
    os.makedirs(folder + "/dev")
    for device in ("null", "zero", "urandom"):
        open(f"{folder}/dev/{device}", "w").close()
        mount(f"/dev/{device}", f"{folder}/dev/{device}", None, BIND)
    os.makedirs(folder + "/tmp", mode=0o777)
    os.chmod(folder + "/tmp", 0o777)
    os.makedirs(folder + "/.old")
    os.chdir(folder)
    number = {"x86_64": 155, "aarch64": 41}[os.uname().machine]
    check(libc.syscall(number, b".", b".old"), "pivot_root")
    os.chdir("/")
    check(libc.umount2(b"/.old", DETACH), "umount of the old root")
    os.rmdir("/.old")


def die_with(parent):
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(SETUP_FAILED)


def limit(options):
    for name, soft in (
        ("RLIMIT_CPU", options["cpu_s"]),
        ("RLIMIT_AS", options["memory_mb"] * 2**20),
        ("RLIMIT_FSIZE", options["file_mb"] * 2**20),
        ("RLIMIT_NPROC", options["processes"]),
        ("RLIMIT_NOFILE", 64),
        ("RLIMIT_CORE", 0),
    ):
        resource.setrlimit(getattr(resource, name), (soft, soft))


def drop_privileges(uid):
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def waited(child):
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def main(options):
    strict = options["level"] == "strict"
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if strict:
        own_namespaces()
        options["ready"] = os.pipe()
        first = os.fork()  # the first process of the PID namespace: all others die with it
        if first:
            os.write(options["write"], f"first {first}\n".encode())
            os.write(options["ready"][1], b".")
            os.close(options["read"])
            os.close(options["write"])
            waited(first)
        os.read(options["ready"][0], 1)  # so that the line above comes first
        for fd in options["ready"]:
            os.close(fd)
        # Inside the new namespace the parent's id shows as 0.
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != 0:
            os._exit(SETUP_FAILED)
        own_root(options["folder"], options["file_mb"])
        program = os.fork()
        if program:
            os.close(options["read"])
            os.close(options["write"])
            waited(program)
        die_with(1)
    else:
        os.chmod(options["folder"], 0o777)
    os.chdir("/tmp" if strict else options["folder"])
    if strict:
        os.setsid()
    limit(options)
    drop_privileges(options["uid"])
    arguments = [sys.executable, "-I", "-S", "-u", "-c", HARNESS, str(options["read"]), str(options["write"])]
    os.set_inheritable(options["read"], True)
    os.set_inheritable(options["write"], True)
    # A new image: as another user without capabilities, and with nothing of the above in its memory.
    os.execve(sys.executable, arguments, {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "PYTHONDONTWRITEBYTECODE": "1"})


HARNESS = r"""
def harness():
    import json, os, sys, traceback
    # Kept from before the program, which may put others in their place.
    read, write, exit, loads, dumps = os.read, os.write, os._exit, json.loads, json.dumps
    compile_, exec_ = compile, exec
    to_us, from_us = int(sys.argv[1]), int(sys.argv[2])
    del sys.argv[1:]
    os.set_inheritable(to_us, False)
    os.set_inheritable(from_us, False)
    errors, Base = traceback.extract_tb, BaseException

    def take():
        def exactly(n):
            data = b""
            while len(data) < n:
                part = read(to_us, n - len(data))
                if not part:
                    exit(0)
                data += part
            return data
        return exactly(int.from_bytes(exactly(8), "big")).decode("utf-8", "surrogatepass")

    def say(text):
        write(from_us, text.encode("utf-8", "replace") + b"\n")

    say("made")
    space = {"__name__": "__main__", "__builtins__": __builtins__}
    error, line = "", None
    try:
        exec_(compile_(take(), "program.py", "exec"), space)
    except Base as problem:
        error = (type(problem).__name__ + ": " + str(problem))[:300]
        if isinstance(problem, SyntaxError):
            line = problem.lineno
        else:
            lines = [frame.lineno for frame in errors(problem.__traceback__) if frame.filename == "program.py"]
            line = lines[-1] if lines else None
    say(dumps({"error": error, "line": line}))
    while True:
        word, test = loads(take())
        try:
            exec_(compile_(test, "test.py", "exec"), dict(space))
        except Base:
            say("failed")
        else:
            say(word)
harness()
"""

if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except OSError as error:
        print(f"{error.strerror or error}", flush=True)
        os._exit(SETUP_FAILED)
