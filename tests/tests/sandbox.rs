//! The sandbox by itself: files on the command line, and AgentFly's code interpreter over HTTP.
#![allow(clippy::unwrap_used, reason = "a story that cannot go on fails here")]

use std::process::Stdio;
use std::time::Duration;

use agentfly_tests::cluster::{Playground, Ran};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStdout};

const SOON: Duration = Duration::from_secs(60);

fn write(playground: &Playground, name: &str, text: &str) {
    std::fs::write(playground.path().join(name), text).unwrap();
}

async fn run(playground: &Playground, args: &[&str]) -> Ran {
    let all: Vec<&str> = ["sandbox", "run"].into_iter().chain(args.iter().copied()).collect();
    playground.run("worker", &all, SOON).await.unwrap()
}

#[tokio::test]
async fn a_file_runs_as_a_script_does_and_its_exit_code_is_the_command_s() {
    let playground = Playground::new().unwrap();
    write(&playground, "good.py", "import sys\nprint(6 * 7)\nprint('to stderr', file=sys.stderr)\n");
    let Ran { code, stdout, stderr } = run(&playground, &["good.py"]).await;
    assert_eq!((code, stdout.as_str(), stderr.as_str()), (Some(0), "42\n", "to stderr\n"));
    write(&playground, "bad.py", "print('before')\n1 / 0\n");
    let Ran { code, stdout, stderr } = run(&playground, &["bad.py"]).await;
    assert_eq!((code, stdout.as_str()), (Some(1), "before\n"));
    assert!(stderr.ends_with("ZeroDivisionError: division by zero\n"), "{stderr}");
    write(&playground, "slow.py", "print('before')\nwhile True: pass\n");
    let Ran { code, stdout, stderr } = run(&playground, &["--wall", "0.5", "slow.py"]).await;
    assert_eq!((code, stdout.as_str()), (Some(124), "before\n"));
    assert!(stderr.contains("slow.py: ended after 0.5 s: it reached its time limit"), "{stderr}");
    let Ran { code, stderr, .. } = run(&playground, &["not-there.py"]).await;
    assert!(code == Some(64) && stderr.contains("cannot read not-there.py"), "{code:?}: {stderr}");
    let Ran { code, stderr, .. } = run(&playground, &["--wall", "600", "good.py"]).await;
    assert!(code == Some(64) && stderr.contains("600000") && stderr.contains("60000"), "{code:?}: {stderr}");
}

#[tokio::test]
async fn json_tells_everything_a_line_a_file() {
    let playground = Playground::new().unwrap();
    write(&playground, "a.py", "print('a')");
    write(&playground, "b.py", "import sys\nsys.exit(3)");
    let Ran { code, stdout, .. } = run(&playground, &["a.py", "b.py", "--json"]).await;
    assert_eq!(code, Some(3));
    let told: Vec<Value> = stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of = |at: usize, keys: &[&str]| keys.iter().map(|key| told[at][key].clone()).collect::<Vec<_>>();
    let keys = ["file", "status", "stdout", "stderr", "exit_code"];
    assert_eq!(of(0, &keys), [json!("a.py"), json!("ok"), json!("a\n"), json!(""), json!(0)]);
    assert_eq!(of(1, &keys), [json!("b.py"), json!("error"), json!(""), json!(""), json!(3)]);
    for line in &told {
        assert!(line["seconds"].as_f64().unwrap() > 0.0 && line["peak_bytes"].is_u64(), "{line}");
        assert!(["root", "user_namespaces", "landlock"].contains(&line["tier"].as_str().unwrap()), "{line}");
    }
    let mut command = playground.command("worker", &["sandbox", "run", "-", "--json", "--echo-last"]);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all("x = 'é'\nx * 2".as_bytes()).await.unwrap();
    let ran = Ran::from(child.wait_with_output().await.unwrap());
    assert_eq!(serde_json::from_str::<Value>(&ran.stdout).unwrap()["stdout"], "'éé'\n");
}

#[tokio::test]
async fn files_share_a_state_only_where_that_is_asked_for() {
    let playground = Playground::new().unwrap();
    write(&playground, "define.py", "x = [1]");
    write(&playground, "fail.py", "x.append(2)\n1 / 0");
    write(&playground, "use.py", "print(x)");
    let Ran { code, stdout, .. } =
        run(&playground, &["--stateful", "--json", "define.py", "fail.py", "use.py"]).await;
    assert_eq!(code, Some(1), "the first that failed");
    let told: Vec<Value> = stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let kept: Vec<_> = told.iter().map(|line| line["kept"].as_bool().unwrap()).collect();
    assert_eq!((kept, told[2]["stdout"].as_str().unwrap()), (vec![true, false, true], "[1]\n"));
    let Ran { code, stderr, .. } = run(&playground, &["define.py", "use.py"]).await;
    assert!(code == Some(1) && stderr.contains("NameError"), "{stderr}");
    assert_eq!(playground.leftovers(), [0_u32; 0]);
}

/// A server on a free port, and where it is.
struct Server {
    child: Child,
    _lines: Lines<BufReader<ChildStdout>>,
    address: String,
}

impl Server {
    async fn start(playground: &Playground, args: &[&str]) -> Self {
        let all: Vec<&str> =
            ["sandbox", "serve", "--preload", ""].into_iter().chain(args.iter().copied()).collect();
        let mut child = playground.command("worker", &all[..]).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let line = tokio::time::timeout(SOON, lines.next_line()).await.unwrap().unwrap().unwrap();
        let address = line.split_once("http://").unwrap().1.split_once('/').unwrap().0.to_owned();
        Self { child, _lines: lines, address }
    }

    /// Status and body of an answer.
    async fn ask(&self, head: &str, body: &str) -> (u16, Value) {
        let mut stream = TcpStream::connect(&self.address).await.unwrap();
        let length = body.len();
        let request =
            format!("{head}\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        tokio::time::timeout(SOON, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
        let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
        let body = answer.split_once("\r\n\r\n").unwrap().1;
        (status, serde_json::from_str(body).unwrap_or(Value::Null))
    }

    async fn exec(&self, code: &str) -> (u16, Value) {
        self.ask("POST /exec HTTP/1.1\r\ncontent-type: application/json", &json!({"code": code}).to_string())
            .await
    }

    async fn stop(mut self) -> Option<i32> {
        let pid = Pid::from_raw(i32::try_from(self.child.id().unwrap()).unwrap()).unwrap();
        kill_process(pid, Signal::INT).unwrap();
        tokio::time::timeout(SOON, self.child.wait()).await.unwrap().unwrap().code()
    }
}

#[tokio::test]
async fn agentfly_s_client_gets_its_answers_over_http() {
    let playground = Playground::new().unwrap();
    let server = Server::start(&playground, &["--listen", "127.0.0.1:0", "--wall", "1"]).await;
    assert_eq!(server.ask("GET /health HTTP/1.1", "").await.0, 200);
    assert_eq!(server.exec("print(6 * 7)").await, (200, json!({"output": "42\n"})));
    let said = |detail: &str, output: &str| json!({"detail": detail, "output": output});
    let error = server.exec("print('before')\nint('x')").await;
    let told = said("ValueError: invalid literal for int() with base 10: 'x'", "before\n");
    assert_eq!(error, (400, told));
    let slow = server.exec("print('before')\nwhile True: pass").await;
    assert_eq!(slow, (408, said("Execution timed out", "before\n")));
    for n in 0..8 {
        assert_eq!(server.exec(&format!("print({n})")).await.1["output"], format!("{n}\n"));
    }
    let (status, told) =
        server.ask("POST /exec HTTP/1.1\r\ncontent-type: application/json", "{\"cod\": 1}").await;
    assert!(status == 422 && told["detail"].as_str().unwrap().contains("missing field `code`"), "{told}");
    assert_eq!(server.stop().await, Some(0));
    assert_eq!(playground.leftovers(), [0_u32; 0]);
}

#[tokio::test]
async fn nobody_runs_code_from_elsewhere_without_the_token() {
    let playground = Playground::new().unwrap();
    let args = ["sandbox", "serve", "--listen", "0.0.0.0:0"];
    let Ran { code, stderr, .. } = playground.run("worker", &args, SOON).await.unwrap();
    assert!(code == Some(64) && stderr.contains("--token-file"), "{code:?}: {stderr}");
    write(&playground, "token.txt", "a-token-of-some-length\n");
    let server = Server::start(&playground, &["--listen", "0.0.0.0:0", "--token-file", "token.txt"]).await;
    let server = Server { address: server.address.replace("0.0.0.0", "127.0.0.1"), ..server };
    let asked = async |header: &str| {
        let head = format!("POST /exec HTTP/1.1\r\ncontent-type: application/json{header}");
        server.ask(&head, "{\"code\": \"print(1)\"}").await
    };
    for header in ["", "\r\nauthorization: Bearer another-token-of-length", "\r\nauthorization: Bearer "] {
        let (status, told) = asked(header).await;
        assert!(status == 401 && !told.to_string().contains("a-token-of-some-length"), "{header}: {told}");
    }
    let (status, told) = asked("\r\nauthorization: Bearer a-token-of-some-length").await;
    assert_eq!((status, told), (200, json!({"output": "1\n"})));
    assert_eq!(server.ask("GET /health HTTP/1.1", "").await.0, 200);
    assert_eq!(server.stop().await, Some(0));
}
