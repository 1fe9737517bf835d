// A small test framework. A test program is one file that includes this header and so gets main():
//
//   TEST(adds) { CHECK_EQ(1 + 1, 2); }
//
// The program prints the name of each test, every check that fails with file and line, and a
// summary. An optional argument runs only the tests whose name contains it. Exit status: 0 if at
// least one test ran and none failed, else 1. A failed check does not end its test; any thread may
// check.

#pragma once

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <sstream>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace check {

struct Test {
  const char* name;
  const char* file;
  int line;
  void (*run)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

struct Registration {
  explicit Registration(const Test& test) { tests().push_back(test); }
};

inline std::atomic<int>& failures() {
  static std::atomic<int> count{0};
  return count;
}

inline void fail(const char* file, int line, const std::string& what) {
  failures().fetch_add(1);
  std::printf("%s:%d: %s\n", file, line, what.c_str());
  std::fflush(stdout);  // what comes next may crash
}

template <class T, class = void>
struct is_printable : std::false_type {};
template <class T>
struct is_printable<
    T, std::void_t<decltype(std::declval<std::ostream&>() << std::declval<const T&>())>>
    : std::true_type {};

template <class T>
std::string show(const T& value) {
  std::ostringstream out;
  if constexpr (std::is_enum_v<T>) {
    out << +static_cast<std::underlying_type_t<T>>(value);
  } else if constexpr (std::is_integral_v<T>) {
    out << +value;
  } else if constexpr (is_printable<T>::value) {
    out << value;
  } else {
    out << "(unprintable)";
  }
  return out.str();
}

// == with two traps removed: integers of different signs compare by value, C strings by content.
template <class A, class B>
bool equal(const A& a, const B& b) {
  if constexpr (std::is_integral_v<A> && std::is_integral_v<B>) {
    const bool a_negative = std::is_signed_v<A> && a < A{};
    const bool b_negative = std::is_signed_v<B> && b < B{};
    return a_negative == b_negative &&
           static_cast<std::uintmax_t>(a) == static_cast<std::uintmax_t>(b);
  } else if constexpr (std::is_convertible_v<const A&, std::string_view> &&
                       std::is_convertible_v<const B&, std::string_view>) {
    return std::string_view(a) == std::string_view(b);
  } else {
    return a == b;
  }
}

template <class A, class B>
void check_equal(const char* file, int line, const char* text, const A& a, const B& b) {
  if (equal(a, b)) return;
  fail(file, line, std::string("CHECK_EQ(") + text + "): " + show(a) + " is not " + show(b));
}

inline int run_all(const std::string& filter) {
  int passed = 0;
  int failed = 0;
  for (const Test& test : tests()) {
    if (std::string(test.name).find(filter) == std::string::npos) continue;
    std::printf("%s\n", test.name);
    std::fflush(stdout);
    const int before = failures().load();
    try {
      test.run();
    } catch (const std::exception& error) {
      fail(test.file, test.line, std::string("the test threw: ") + error.what());
    } catch (...) {
      fail(test.file, test.line, "the test threw something that is no std::exception");
    }
    ++(failures().load() == before ? passed : failed);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return passed > 0 && failed == 0 ? 0 : 1;
}

}  // namespace check

#define TEST(name)                                                                            \
  static void test_##name();                                                                  \
  static const check::Registration register_##name({#name, __FILE__, __LINE__, test_##name}); \
  static void test_##name()

#define CHECK(...)                                                                        \
  do {                                                                                    \
    if (!(__VA_ARGS__)) check::fail(__FILE__, __LINE__, "CHECK(" #__VA_ARGS__ ") fails"); \
  } while (false)

#define CHECK_EQ(...) check::check_equal(__FILE__, __LINE__, #__VA_ARGS__, __VA_ARGS__)

#define CHECK_THROWS(expression, Type)                                                   \
  do {                                                                                   \
    bool check_thrown = false;                                                           \
    try {                                                                                \
      static_cast<void>(expression);                                                     \
    } catch (const Type&) {                                                              \
      check_thrown = true;                                                               \
    } catch (...) {                                                                      \
    }                                                                                    \
    if (!check_thrown) {                                                                 \
      check::fail(__FILE__, __LINE__, "CHECK_THROWS(" #expression ", " #Type ") fails"); \
    }                                                                                    \
  } while (false)

int main(int argc, char** argv) { return check::run_all(argc > 1 ? argv[1] : ""); }
