// Exceptions end at the shim's border: every function of the C interface runs its body in guarded().
#pragma once
#include "shim.h"

#include <c10/util/Exception.h>

#include <string>

namespace af {

// Keeps the text for af_last_error() and returns the code that fits it.
int fail(const std::string& text, int otherwise);
// The same for what this build cannot do: AF_UNSUPPORTED.
int unsupported(const std::string& text);

template <class F>
int guarded(F&& body) noexcept {
  try {
    body();
    return AF_OK;
  } catch (const c10::DistNetworkError& e) {
    return fail(e.what_without_backtrace(), AF_NETWORK);
  } catch (const c10::DistStoreError& e) {
    return fail(e.what_without_backtrace(), AF_STORE);
  } catch (const c10::DistBackendError& e) {
    return fail(e.what_without_backtrace(), AF_BACKEND);
  } catch (const c10::Error& e) {
    return fail(e.what_without_backtrace(), AF_OTHER);
  } catch (const std::exception& e) {
    return fail(e.what(), AF_OTHER);
  } catch (...) {
    return fail("an exception that is not a std::exception", AF_OTHER);
  }
}

}  // namespace af
