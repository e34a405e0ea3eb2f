//! Compiles the C++ shim against the libtorch that torch-sys found, and links it.
//!
//! `AGENTFLY_CUDA_INCLUDE` (a path list) names the CUDA and NCCL headers for the `nccl` feature when they do not
//! lie beside libtorch as in a full PyTorch installation.

use std::env;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Below `csrc/`.
const SOURCES: [&str; 14] = [
    "shim",
    "graph",
    "ops",
    "ops/gemm",
    "ops/linear",
    "ops/weight_gradient",
    "ops/few_rows",
    "ops/pointwise",
    "ops/attention",
    "ops/attention_backward",
    "ops/input_gradient",
    "ops/packed",
    "ops/attention_plain",
    "ops/vocabulary",
];

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            println!("cargo::error={message}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    println!("cargo::rerun-if-changed=csrc");
    for variable in ["LIBTORCH", "LIBTORCH_INCLUDE", "AGENTFLY_CUDA_INCLUDE"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    // torch-sys has `links = "tch"` and reports its library folder, whichever way it found libtorch.
    let lib = PathBuf::from(
        env::var("DEP_TCH_LIBTORCH_LIB")
            .map_err(|_| "torch-sys reported no libtorch: run `make setup`, or set LIBTORCH to one")?,
    );
    let root = match env::var_os("LIBTORCH_INCLUDE") {
        Some(path) => PathBuf::from(path),
        None => lib.parent().unwrap_or(Path::new("/")).to_path_buf(),
    };
    let include = root.join("include");
    let witness = include.join("torch/csrc/distributed/c10d/TCPStore.hpp");
    if !witness.exists() {
        return Err(format!(
            "{} does not exist: this libtorch is missing or has no distributed headers. Run `make setup`, \
             which fetches libtorch 2.11.0 into third_party/libtorch, or set LIBTORCH to a full one",
            witness.display()
        ));
    }
    println!("cargo::rustc-env=LIBTORCH_VERSION={}", version(&include));
    let nccl = env::var_os("CARGO_FEATURE_NCCL").is_some();
    let mut shim = cc::Build::new();
    shim.cpp(true)
        .pic(true)
        .std("c++17")
        .warnings(false)
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .define("USE_DISTRIBUTED", None)
        .define("USE_C10D_GLOO", None)
        .include("csrc")
        .include("csrc/gloo_decl")
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        // The operators' loops are written to be vectorised, whatever the profile.
        .opt_level(3)
        // libtorch's headers would make a hundred megabytes of it, and the build minutes longer.
        .debug(false)
        .flags(["-fopenmp", "-fno-math-errno", "-fno-trapping-math"])
        .files(SOURCES.map(|name| format!("csrc/{name}.cpp")));
    if nccl {
        shim.define("AF_NCCL", None).define("USE_C10D_NCCL", None);
        for folder in cuda_includes(&root)? {
            shim.include(folder);
        }
    }
    shim.try_compile("agentfly_c10d_shim").map_err(|e| format!("the c10d shim does not compile: {e}"))?;
    println!("cargo::rustc-link-search=native={}", lib.display());
    let libraries: &[&str] =
        if nccl { &["torch_cuda", "c10_cuda", "torch_cpu", "c10"] } else { &["torch_cpu", "c10"] };
    for library in libraries {
        println!("cargo::rustc-link-lib={library}");
    }
    // libtorch's own threads: its OpenMP and this one's are one library by name.
    println!("cargo::rustc-link-lib=gomp");
    Ok(())
}

/// The folders of the CUDA and NCCL headers: named by the environment, or as wheels lay them out.
fn cuda_includes(root: &Path) -> Result<Vec<PathBuf>, String> {
    let folders = match env::var_os("AGENTFLY_CUDA_INCLUDE") {
        Some(list) => env::split_paths(&list).collect::<Vec<_>>(),
        None => ["cu13", "nccl"].iter().map(|p| root.join("../nvidia").join(p).join("include")).collect(),
    };
    match folders.iter().find(|folder| !folder.exists()) {
        Some(missing) => Err(format!(
            "feature `nccl` needs CUDA headers, and {} does not exist: use a CUDA libtorch, or name the folders \
             in AGENTFLY_CUDA_INCLUDE",
            missing.display()
        )),
        None => Ok(folders),
    }
}

/// `2.11.0`, from libtorch's own header.
fn version(include: &Path) -> String {
    let header = std::fs::read_to_string(include.join("torch/headeronly/version.h")).unwrap_or_default();
    let number = |part: &str| {
        let line =
            header.lines().find_map(|line| line.strip_prefix(&format!("#define TORCH_VERSION_{part} ")));
        line.map_or("?", str::trim).to_owned()
    };
    ["MAJOR", "MINOR", "PATCH"].map(number).join(".")
}
