/* Makes a folder behave as one that is mounted over NFS, for a process that is started with LD_PRELOAD:

     STALE_FOLDER=/path STALE_SECONDS=5 LD_PRELOAD=./stale_disk.so python ...

   A name that was looked up in vain stays absent, and a listing stays as it was, for STALE_SECONDS; unless this process
   itself changes the folder that they are in, after which the client of NFS asks the server. flock has no locks to give.
   Each process is a client of its own, as if it ran on another host. For each file that is there and is not shown, a
   line in $STALE_LOG has its name. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define MOST 16384
#define REAL(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))

struct entry { char *path; double since; long version; char *names; };
static struct entry absent[MOST], listed[MOST], changed[MOST];
static int num_absent, num_listed, num_changed;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec + time.tv_nsec * 1e-9;
}

static double seconds(void) {
  const char *text = getenv("STALE_SECONDS");
  return text ? atof(text) : 5;
}

/* At once, as a process may be killed. */
static void tell(const char *name) {
  const char *path = getenv("STALE_LOG");
  int log = path ? REAL(open)(path, O_WRONLY | O_APPEND | O_CREAT, 0666) : -1;
  if (log >= 0) dprintf(log, "%s\n", name), close(log);
}

/* Writes the absolute path of a file below the folder; returns 0 for all other files. */
static int inside(int at, const char *path, char *out) {
  const char *folder = getenv("STALE_FOLDER");
  char base[PATH_MAX] = "", link[64];
  if (!folder || !path || !*path) return 0;
  if (*path != '/') {
    if (at == AT_FDCWD) {
      if (!getcwd(base, sizeof base)) return 0;
    } else {
      snprintf(link, sizeof link, "/proc/self/fd/%d", at);
      ssize_t length = readlink(link, base, sizeof base - 1);
      if (length < 0) return 0;
      base[length] = 0;
    }
    strncat(base, "/", sizeof base - strlen(base) - 1);
  }
  if (snprintf(out, PATH_MAX, "%s%s", base, path) >= PATH_MAX) return 0;
  size_t length = strlen(folder), end = strlen(out);
  while (end > 1 && out[end - 1] == '/') out[--end] = 0;
  return !strncmp(out, folder, length) && (out[length] == '/' || !out[length]);
}

static struct entry *find(struct entry *table, int count, const char *path) {
  for (int i = 0; i < count; i++)
    if (!strcmp(table[i].path, path)) return &table[i];
  return NULL;
}

static struct entry *add(struct entry *table, int *count, const char *path) {
  struct entry *found = find(table, *count, path);
  if (found) return found;
  if (*count == MOST) abort();
  table[*count].path = strdup(path);
  return &table[(*count)++];
}

static void parent(const char *path, char *out) {
  strcpy(out, path);
  char *slash = strrchr(out, '/');
  if (slash) *slash = 0;
}

/* How often this process has changed a folder. */
static long version(const char *folder) {
  struct entry *found = find(changed, num_changed, folder);
  return found ? found->version : 0;
}

static void change(int at, const char *path) {
  char whole[PATH_MAX], folder[PATH_MAX];
  if (!inside(at, path, whole)) return;
  parent(whole, folder);
  pthread_mutex_lock(&lock);
  add(changed, &num_changed, folder)->version++;
  pthread_mutex_unlock(&lock);
}

/* Returns 1 if this client believes that a file, or a folder above it, is absent. */
static int believed_absent(const char *whole) {
  char part[PATH_MAX], folder[PATH_MAX];
  size_t start = strlen(getenv("STALE_FOLDER"));
  int found = 0;
  pthread_mutex_lock(&lock);
  for (const char *end = whole + start; end && !found;) {
    end = *end ? strchr(end + 1, '/') : NULL;
    snprintf(part, sizeof part, "%.*s", end ? (int)(end - whole) : (int)strlen(whole), whole);
    struct entry *entry = find(absent, num_absent, part);
    if (!entry) continue;
    parent(part, folder);
    found = now() - entry->since < seconds() && entry->version == version(folder);
  }
  pthread_mutex_unlock(&lock);
  return found;
}

static int parent_is_absent(int at, const char *path) {
  char whole[PATH_MAX], folder[PATH_MAX];
  if (!inside(at, path, whole) || !strcmp(whole, getenv("STALE_FOLDER"))) return 0;
  parent(whole, folder);
  return believed_absent(folder);
}

/* Remembers the first part of a path that is absent. */
static void remember(const char *whole) {
  char part[PATH_MAX], folder[PATH_MAX];
  struct stat unused;
  size_t start = strlen(getenv("STALE_FOLDER"));
  for (const char *end = whole + start; end;) {
    end = *end ? strchr(end + 1, '/') : NULL;
    snprintf(part, sizeof part, "%.*s", end ? (int)(end - whole) : (int)strlen(whole), whole);
    if (!REAL(lstat)(part, &unused)) continue;
    parent(part, folder);
    pthread_mutex_lock(&lock);
    struct entry *entry = add(absent, &num_absent, part);
    entry->since = now();
    entry->version = version(folder);
    pthread_mutex_unlock(&lock);
    return;
  }
}

/* A look at a file, with a call that returns -1 where there is none. */
#define LOOK(at, path, call)                                                                  \
  char whole[PATH_MAX];                                                                       \
  if (!inside(at, path, whole)) return call;                                                  \
  if (believed_absent(whole)) {                                                               \
    struct stat unused;                                                                       \
    if (!REAL(lstat)(whole, &unused)) tell(whole);                                            \
    errno = ENOENT;                                                                           \
    return -1;                                                                                \
  }                                                                                           \
  int result = call;                                                                          \
  if (result < 0 && errno == ENOENT) remember(whole), errno = ENOENT;                         \
  return result;

/* A change of a folder. That a name exists is an answer of the server, too. */
#define CHANGE(at, path, call)                                                                \
  if (parent_is_absent(at, path)) return errno = ENOENT, -1;                                  \
  int result = call, error = errno;                                                           \
  if (result >= 0 || error == EEXIST) change(at, path);                                       \
  errno = error;                                                                              \
  return result;

#define OPEN(name, at, path, flags, ...)                                                      \
  mode_t mode = 0;                                                                            \
  if (flags & (O_CREAT | __O_TMPFILE)) {                                                      \
    va_list rest;                                                                             \
    va_start(rest, flags);                                                                    \
    mode = va_arg(rest, mode_t);                                                              \
    va_end(rest);                                                                             \
    CHANGE(at, path, REAL(name)(__VA_ARGS__, flags, mode))                                    \
  }                                                                                           \
  LOOK(at, path, REAL(name)(__VA_ARGS__, flags))

int open(const char *path, int flags, ...) { OPEN(open, AT_FDCWD, path, flags, path) }
int open64(const char *path, int flags, ...) { OPEN(open64, AT_FDCWD, path, flags, path) }
int openat(int at, const char *path, int flags, ...) { OPEN(openat, at, path, flags, at, path) }
int openat64(int at, const char *path, int flags, ...) { OPEN(openat64, at, path, flags, at, path) }
int stat(const char *path, struct stat *s) { LOOK(AT_FDCWD, path, REAL(stat)(path, s)) }
int stat64(const char *path, struct stat64 *s) { LOOK(AT_FDCWD, path, REAL(stat64)(path, s)) }
int lstat(const char *path, struct stat *s) { LOOK(AT_FDCWD, path, REAL(lstat)(path, s)) }
int lstat64(const char *path, struct stat64 *s) { LOOK(AT_FDCWD, path, REAL(lstat64)(path, s)) }
int fstatat(int at, const char *path, struct stat *s, int f) { LOOK(at, path, REAL(fstatat)(at, path, s, f)) }
int fstatat64(int at, const char *path, struct stat64 *s, int f) { LOOK(at, path, REAL(fstatat64)(at, path, s, f)) }
int statx(int at, const char *restrict path, int f, unsigned m, struct statx *restrict s) {
  LOOK(at, path, REAL(statx)(at, path, f, m, s))
}
int access(const char *path, int mode) { LOOK(AT_FDCWD, path, REAL(access)(path, mode)) }
int mkdir(const char *path, mode_t mode) { CHANGE(AT_FDCWD, path, REAL(mkdir)(path, mode)) }
int rmdir(const char *path) { CHANGE(AT_FDCWD, path, REAL(rmdir)(path)) }
int unlink(const char *path) { CHANGE(AT_FDCWD, path, REAL(unlink)(path)) }
int unlinkat(int at, const char *path, int f) { CHANGE(at, path, REAL(unlinkat)(at, path, f)) }
int link(const char *from, const char *to) { CHANGE(AT_FDCWD, to, REAL(link)(from, to)) }
int linkat(int a, const char *from, int b, const char *to, int f) { CHANGE(b, to, REAL(linkat)(a, from, b, to, f)) }
int rename(const char *from, const char *to) {
  int done = REAL(rename)(from, to), error = errno;
  if (!done) change(AT_FDCWD, from), change(AT_FDCWD, to);
  errno = error;
  return done;
}
int renameat(int a, const char *from, int b, const char *to) {
  int done = REAL(renameat)(a, from, b, to), error = errno;
  if (!done) change(a, from), change(b, to);
  errno = error;
  return done;
}
int flock(int descriptor, int operation) {
  (void)descriptor, (void)operation;
  errno = ENOLCK;
  return -1;
}

/* Listings: names that were not there when this client last asked are left out. */
static struct entry *listing(DIR *folder) {
  char link[64], path[PATH_MAX], whole[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", dirfd(folder));
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return NULL;
  path[length] = 0;
  if (!inside(AT_FDCWD, path, whole)) return NULL;
  struct entry *entry = add(listed, &num_listed, whole);
  if (entry->names && now() - entry->since < seconds() && entry->version == version(whole)) return entry;
  DIR *again = REAL(opendir)(whole);
  if (!again) return NULL;
  char *names = calloc(1, 1 << 20);
  strcpy(names, "/");
  for (struct dirent64 *one; (one = REAL(readdir64)(again));)
    strcat(names, one->d_name), strcat(names, "/");
  closedir(again);
  free(entry->names);
  entry->names = names, entry->since = now(), entry->version = version(whole);
  return entry;
}

struct dirent64 *readdir64(DIR *folder) {
  int error = errno;
  for (;;) {
    struct dirent64 *one = REAL(readdir64)(folder);
    if (!one) return NULL;
    char name[300];
    snprintf(name, sizeof name, "/%s/", one->d_name);
    pthread_mutex_lock(&lock);
    struct entry *entry = listing(folder);
    int shown = !entry || strstr(entry->names, name);
    if (!shown) tell(one->d_name);
    pthread_mutex_unlock(&lock);
    errno = error;
    if (shown) return one;
  }
}
struct dirent *readdir(DIR *folder) { return (struct dirent *)readdir64(folder); }
