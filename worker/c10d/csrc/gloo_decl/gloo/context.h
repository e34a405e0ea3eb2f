// libtorch ships c10d's headers but not Gloo's, which they include. c10d's classes hold only pointers to Gloo
// types, so declarations are enough to compile against them; every Gloo object is made and used inside
// libtorch_cpu.so, and none of these declarations is ever given a body.
#pragma once
#include <chrono>

namespace gloo {
class Context {
 public:
  void setTimeout(std::chrono::milliseconds timeout);
};
}  // namespace gloo
