// SPDX-License-Identifier: Apache-2.0
#include "infllm/core/mapped_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

namespace infllm {
namespace {

// A file descriptor that is closed at the end of the scope; the mapping outlives it.
struct Descriptor {
  int fd;
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
};

Status system_failure(const std::filesystem::path& path, const char* action, int error) {
  std::string message =
      fmt::format("{}: {}: {}", path.string(), action, std::generic_category().message(error));
  if (error == ENOENT || error == ENOTDIR) return not_found(std::move(message));
  return io_error(std::move(message));
}

}  // namespace

Result<MappedFile> MappedFile::open(const std::filesystem::path& path) {
  // O_NONBLOCK: a named pipe in place of the file must not hang us; fstat refuses it below.
  const Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  if (file.fd < 0) return system_failure(path, "cannot be opened for reading", errno);
  struct stat info {};
  if (::fstat(file.fd, &info) != 0) return system_failure(path, "cannot be examined", errno);
  if (!S_ISREG(info.st_mode)) {
    return io_error(fmt::format("{}: not a regular file", path.string()));
  }
  MappedFile mapped;
  mapped.size_ = static_cast<std::size_t>(info.st_size);
  if (mapped.size_ == 0) return mapped;
  void* data = ::mmap(nullptr, mapped.size_, PROT_READ, MAP_PRIVATE, file.fd, 0);
  if (data == MAP_FAILED) return system_failure(path, "cannot be mapped into memory", errno);
  mapped.data_ = std::shared_ptr<const std::byte>(
      static_cast<const std::byte*>(data),
      [data, size = mapped.size_](const std::byte*) { ::munmap(data, size); });
  return mapped;
}

}  // namespace infllm
