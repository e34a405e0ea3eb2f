//! The `worker` program.

fn main() -> std::process::ExitCode {
    agentfly_worker::cli::main()
}
