//! Compiles the proto files without protoc: protox parses, tonic-prost-build generates.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["types", "cluster", "trajectories", "jobs"].map(|name| format!("agentfly/v1/{name}.proto"));
    println!("cargo:rerun-if-changed=agentfly");
    let descriptors = protox::compile(&files, ["."])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
