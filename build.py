"""The only build recipe: tables -> C and cffi text -> build/libpkcs11-ha.so, with ck.py and docs beside it; the worker;
the man pages; and the fault module of the tests (docs/fault-injection.md).

Run by `make build` with the interpreter that is to be embedded.  Files are written only when they change, and
objects are compiled only when what they are made of changed, so a second run does nothing.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import hashlib
import io
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SHIM = ROOT / "shim"
CSRC = SHIM / "csrc"
WORKER = SHIM / "worker"
FAULT = ROOT / "tests" / "fault"
FUZZ = ROOT / "tests" / "fuzz"
sys.path.insert(0, str(SHIM))

from pkcs11_ha import __version__  # noqa: E402
from pkcs11_ha.spec import emit, fault, fuzz, segment, signature, wire  # noqa: E402

MODULE = "_pkcs11_ha"  # the cffi module inside the library
# Whatever the core raises here is one line: cffi would print a traceback into the host's stderr.
INIT_CODE = f"""\
import {MODULE}, pkcs11_ha.entry
try:
    pkcs11_ha.entry.attach({MODULE}.ffi, {MODULE}.lib)
except BaseException as error:
    {MODULE}.lib.ha_say(f"broken installation: {{type(error).__name__}}: {{error}}".encode("utf-8", "replace"))
"""

WARNINGS = (
    "-Wall -Wextra -Wconversion -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wvla -Werror".split()
)
# -O2: the data plane is nanoseconds.  Hidden by default: the version script is a second lock on the same door.
COMMON = "-std=gnu11 -g -fPIC -fvisibility=hidden -fno-plt -pthread -D_GNU_SOURCE".split()
# What is undefined ends the program, as what is out of bounds does: a line that goes by is read by nobody.
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}


def write(path: Path, text: str) -> None:
    """Writes only what differs, so that time stamps mean something."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def run(command: Sequence[str]) -> None:
    """Runs a tool of the build; its own words are the error message."""
    if subprocess.run(command, check=False).returncode != 0:
        sys.exit(f"build: failed: {' '.join(command)}")


def libpython() -> tuple[Path, str]:
    """Directory and file name of the shared libpython of this interpreter; exits if there is none."""
    name = sysconfig.get_config_var("INSTSONAME") or ""
    directory = sysconfig.get_config_var("LIBDIR") or ""
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    for candidate in (Path(directory), Path(directory) / multiarch, Path("/usr/lib") / multiarch):
        if ".so" in name and (candidate / name).exists():
            return candidate, name
    sys.exit(f"build: {sys.executable} has no shared libpython; see README, 'Which Python'")


def emit_all(out: Path, paths: Sequence[str], worker: Path) -> None:
    """Every generated file but the cffi module's C text, which needs all of them."""
    header = str(ROOT / "include" / "pkcs11.h")
    text = signature.preprocess(header, str(ROOT / "include" / "pkcs11_ha.h"))
    prototypes = signature.prototypes(text)
    emit.verify(prototypes)
    core_abi = (CSRC / "core_abi.h").read_text(encoding="utf-8")
    declarations = emit.cdef(text, core_abi, prototypes)
    stamp = (
        f"{__version__}+{hashlib.sha256((declarations + emit.entries(prototypes)).encode()).hexdigest()[:12]}"
    )

    write(out / "functions.gen.h", emit.functions_header(prototypes))
    write(out / "upcalls.gen.h", emit.upcalls_header(prototypes))
    write(out / "segment.gen.h", segment.c_header())
    write(out / "entry.gen.c", emit.entries(prototypes))
    write(out / "parameters.gen.c", emit.parameters())
    write(out / "exports.map", emit.exports())
    write(out / "build.gen.h", build_header(stamp, paths, worker))
    constants = signature.constants(header)
    write(out / "wire.gen.c", wire.common(prototypes, constants))
    write(out / "remote.gen.c", wire.stubs(prototypes))
    write(out / "serve.gen.c", wire.served(prototypes))
    write(out / "fault.gen.c", fault.wrappers(prototypes, constants))
    write(out / "fault.map", fault.exports())
    write(out / "callers.gen.c", fuzz.callers(prototypes, constants))
    write(out / "vendor.gen.c", fuzz.vendor(prototypes))
    names = ", ".join(f'"{name}"' for name in emit.upcall_names(prototypes))
    write(
        SHIM / "pkcs11_ha" / "ck.py",
        emit.constants_module(constants) + f'\nSTAMP = "{stamp}"\n\nUPCALLS = ({names})\n',
    )
    write_pages(ROOT / "docs")
    write_cffi_module(out, declarations, emit.native_source(prototypes))


def write_pages(docs: Path) -> None:
    """The generated pages; their tables need ck.py, which is written by now."""
    from pkcs11_ha.spec import pages

    write(docs / "functions.md", pages.functions())
    write(docs / "mechanisms.md", pages.mechanisms())
    write(docs / "configuration.md", pages.configuration())
    write(docs / "messages.md", pages.messages())
    write(docs / "return-codes.md", pages.return_codes())
    write(docs / "demo-menu.md", pages.demo_menu())
    write(docs / "status-segments.md", pages.status_segments())


def write_manual(output: Path) -> None:
    """The man pages and the shells' completion, which come from the command itself."""
    from pkcs11_ha.cli import main, manual

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = readme.partition("```toml\n")[2].partition("```")[0]
    write(output / "man" / "p11ha.1", manual.command_page(main.app))
    write(output / "man" / "pkcs11-ha.toml.5", manual.configuration_page(example))
    for name, script in manual.completions(main.app).items():
        write(output / "completions" / name, script)


def build_header(stamp: str, paths: Sequence[str], worker: Path) -> str:
    quoted = ", ".join(f'"{path}"' for path in paths)
    return (
        emit.BANNER
        + f'#define HA_VERSION "{stamp}"\n#define HA_PYTHON_HOME "{sys.base_prefix}"\n'
        + f'#define HA_PYTHON_STDLIB "{sysconfig.get_path("stdlib")}"\n'
        + f'#define HA_LIBPYTHON "{libpython()[1]}"\n#define HA_PATHS {quoted}\n'
        + f'#define HA_WORKER "{worker}"\n'
    )


def write_cffi_module(out: Path, declarations: str, source: str) -> None:
    from cffi import FFI

    ffi = FFI()
    ffi.embedding_api("")
    ffi.cdef(declarations)
    ffi.set_source(MODULE, source)
    ffi.embedding_init_code(INIT_CODE)
    fresh = out / "module.gen.c.new"
    with contextlib.redirect_stdout(io.StringIO()):  # it says what it generates, every time
        ffi.emit_c_code(str(fresh))
    write(out / "module.gen.c", fresh.read_text(encoding="utf-8"))
    fresh.unlink()


def compiler(sanitize: str) -> list[str]:
    """The compiler and how it optimises; libFuzzer is clang's, which does not tell that it sanitizes."""
    if sanitize == "fuzzer":
        how = "-fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=all -D__SANITIZE_ADDRESS__=1"
        return ["clang", "-O1", *how.split(), "-fno-omit-frame-pointer"]
    if sanitize:
        return ["cc", "-O1", *SANITIZERS[sanitize], "-fno-omit-frame-pointer"]
    return ["cc", "-O2", "-flto=auto"]


# Of the library's sources, those that the worker is made of too.
SHARED = ("wire.c", "line.c", "serve.c", "library.c", "wire.gen.c", "parameters.gen.c", "serve.gen.c")


def library_sources(out: Path) -> list[Path]:
    """What the library is made of."""
    names = ("entry", "parameters", "wire", "remote", "serve", "module")
    return [*sorted(CSRC.glob("*.c")), *(out / f"{name}.gen.c" for name in names)]


def compile_all(out: Path, sanitize: str) -> tuple[list[Path], list[Path], list[Path]]:
    """Objects of our sources (warnings are errors) and of cffi's text (not ours to judge): library, worker, faults."""
    include = [f"-I{ROOT / 'include'}", f"-I{CSRC}", f"-I{WORKER}", f"-I{FAULT}", f"-I{out}"]
    include.append(f"-I{sysconfig.get_path('include')}")
    library = library_sources(out)
    worker = sorted(WORKER.glob("*.c"))
    faults = [*sorted(FAULT.glob("*.c")), out / "fault.gen.c"]
    objects = compile_each([*library, *worker, *faults], out, sanitize, include)
    shared = [source for source in library if source.name in SHARED]
    return (
        [objects[source] for source in library],
        [objects[source] for source in shared + worker],
        [objects[source] for source in faults],
    )


def compile_each(
    sources: Sequence[Path], out: Path, sanitize: str, include: Sequence[str]
) -> dict[Path, Path]:
    """Source -> object, made where it is older than what it is made of."""
    headers = [path for option in include for path in Path(option.removeprefix("-I")).glob("*.h")]
    newest = max(path.stat().st_mtime for path in [*headers, Path(__file__)])

    def one(source: Path) -> Path:
        target = out / (source.stem + ".o")
        if not target.exists() or target.stat().st_mtime < max(newest, source.stat().st_mtime):
            judged = sanitize == "fuzzer" and source.parent in (CSRC, WORKER, FAULT)  # by gcc
            warnings = ["-w"] if judged or source.name == "module.gen.c" else WARNINGS
            run([*compiler(sanitize), *COMMON, *warnings, *include, "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(sources, pool.map(one, sources), strict=True))


# The fuzzers, each tests/fuzz/NAME.c with all of ours, and the functions of ours that it stands before.
FUZZERS = {
    "boundary": (),
    "requests": ("ha_secret_pages", "munmap"),
    "answers": ("ha_secret_pages", "munmap", "ha_line_ask", "ha_receive"),
    "parameters": ("ha_object_valid", "ha_call_adopt"),
}


def build_fuzzers(out: Path, output: Path) -> None:
    """The fuzzers, and the library that the fuzzed group's members have."""
    include = [f"-I{path}" for path in (ROOT / "include", CSRC, WORKER, FUZZ, FUZZ.parent / "fake", out)]
    sources = [*sorted(FUZZ.glob("*.c")), FUZZ.parent / "fake" / "fake.c"]
    sources += [out / "callers.gen.c", out / "vendor.gen.c"]
    made = compile_each(sources, out, "fuzzer", include)
    objects = {source.name.removesuffix(".c"): str(target) for source, target in made.items()}
    library, _, _ = compile_all(out, "fuzzer")
    shared = [objects[name] for name in ("fuzz", "callers.gen", "vendor", "vendor.gen", "serving")]
    token = [objects[name] for name in ("fake", "token", "vendor", "vendor.gen")]
    token += [str(path) for path in library if path.name in ("wire.gen.o", "parameters.gen.o")]
    directory, name = libpython()
    fuzzer = ["clang", "-fsanitize=fuzzer,address,undefined", "-pthread", f"-Wl,-rpath,{directory}"]
    ours = [*map(str, library), str(directory / name), "-ldl"]
    for target, before in FUZZERS.items():
        wraps = [f"-Wl,--wrap={function}" for function in before]
        # those of `serving` are for the two that wrap what it stands before
        parts = [part for part in shared if part != objects["serving"] or "munmap" in before]
        run([*fuzzer, *wraps, "-o", str(output / target), objects[target], *parts, *ours])
    plain = "clang -shared -fsanitize=fuzzer-no-link,address,undefined -Wl,-Bsymbolic".split()
    run([*plain, "-o", str(output / "libmember.so"), *token])


def link(out: Path, objects: Sequence[Path], library: Path, sanitize: str) -> None:
    directory, name = libpython()
    if library.exists() and library.stat().st_mtime >= max(path.stat().st_mtime for path in objects):
        return
    search = [] if str(directory).startswith("/usr/lib") else [f"-Wl,-rpath,{directory}"]
    # nodelete: threads and fork handlers of ours may outlive a dlclose.
    hardening = "-Wl,-z,relro,-z,now,-z,nodelete,-z,noexecstack,--no-undefined".split()
    run(
        [
            "cc", "-shared", "-pthread", *(SANITIZERS[sanitize] if sanitize else ["-O2", "-flto=auto"]),
            *map(str, objects), "-o", str(library), f"-Wl,--version-script={out / 'exports.map'}",
            "-Wl,-Bsymbolic", f"-Wl,-soname,{library.name}",
            *(["-Wl,-z,nodelete"] if sanitize else hardening), *search, str(directory / name), "-ldl",
        ]
    )  # fmt: skip


def link_worker(objects: Sequence[Path], worker: Path, sanitize: str) -> None:
    if worker.exists() and worker.stat().st_mtime >= max(path.stat().st_mtime for path in objects):
        return
    # A sanitizer looks for the C++ runtime when it starts, and vendor libraries that throw bring it later.
    how = [*SANITIZERS[sanitize], "-Wl,--no-as-needed", "-lstdc++"] if sanitize else ["-O2", "-flto=auto"]
    fresh = worker.with_name(worker.name + ".new")  # workers of the one before may be running
    hardening = "-Wl,-z,relro,-z,now,-z,noexecstack".split()
    run(["cc", "-pie", "-pthread", *how, *map(str, objects), "-o", str(fresh), *hardening, "-ldl"])
    fresh.replace(worker)


def link_fault(out: Path, objects: Sequence[Path], library: Path, sanitize: str) -> None:
    """The fault module: C alone, and as the library it exports what it must."""
    if library.exists() and library.stat().st_mtime >= max(path.stat().st_mtime for path in objects):
        return
    how = SANITIZERS[sanitize] if sanitize else ["-O2", "-flto=auto", "-Wl,--no-undefined"]
    fresh = library.with_name(
        library.name + ".new"
    )  # programs that have loaded the one before may be running
    run(
        [
            "cc", "-shared", "-pthread", *how, *map(str, objects), "-o", str(fresh), "-Wl,-Bsymbolic",
            f"-Wl,--version-script={out / 'fault.map'}", f"-Wl,-soname,{library.name}",
            *"-Wl,-z,relro,-z,now,-z,noexecstack".split(), "-ldl",
        ]
    )  # fmt: skip
    fresh.replace(library)


def copy_backend(runtime: Path) -> None:
    """The one extension module that the core needs, apart from all else that the build's site-packages hold."""
    import _cffi_backend

    source = Path(_cffi_backend.__file__)
    target = runtime / source.name
    runtime.mkdir(parents=True, exist_ok=True)
    if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
        shutil.copy2(source, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sanitize", default="", choices=("", *SANITIZERS, "fuzzer"))
    parser.add_argument("--output", type=Path, default=None, help="directory of libpkcs11-ha.so")
    parser.add_argument(
        "--installed", type=Path, default=None, help="where the Python files will be found at run time"
    )
    parser.add_argument(
        "--worker", type=Path, default=None, help="where the worker will be found at run time"
    )
    arguments = parser.parse_args()

    output = (arguments.output or ROOT / "build" / {"": ".", "address": "asan", "thread": "tsan", "fuzzer": "fuzz"}[
        arguments.sanitize]).resolve()  # fmt: skip
    out = output / "gen"
    runtime = output / "runtime"
    where = [str(arguments.installed)] if arguments.installed else [str(SHIM), str(runtime)]
    copy_backend(runtime)
    worker = output / "pkcs11-ha-worker"
    emit_all(out, where, arguments.worker or worker)
    write_manual(output)
    # The embedded interpreter writes nothing, so what it loads is compiled now: a tenth of a second a start.
    compileall.compile_dir(SHIM / "pkcs11_ha", quiet=1)
    if arguments.sanitize == "fuzzer":
        build_fuzzers(out, output)
        return
    objects, worker_objects, fault_objects = compile_all(out, arguments.sanitize)
    link(out, objects, output / "libpkcs11-ha.so", arguments.sanitize)
    link_worker(worker_objects, worker, arguments.sanitize)
    link_fault(out, fault_objects, output / "libpkcs11-fault.so", arguments.sanitize)


if __name__ == "__main__":
    main()
