/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

/* Registers, and their bits. */
enum { DATA, INTERRUPTS, IDENTITY, LINE, MODEM, LINE_STATUS, MODEM_STATUS, SCRATCH };
enum { LINE_DIVISOR = 0x80, STATUS_RECEIVED = 0x01, STATUS_ROOM = 0x60 };

/* ---- Where the bytes go ---- */

int connect_to(const char *option, const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof(address.sun_path))
        return complain("%s: the path %s is too long", option, path);
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
        return complain("%s: cannot connect to %s: %s", option, path, strerror(errno));
    return fd;
}

int serial_open(struct serial *s, const char *where)
{
    *s = (struct serial){.in_fd = -1, .out_fd = -1};
    pthread_mutex_init(&s->lock, NULL);
    if (!strcmp(where, "null"))
        return 0;
    if (!strcmp(where, "stdio")) {
        s->in_fd = STDIN_FILENO;
        s->out_fd = STDOUT_FILENO;
        return 0;
    }
    if (!strncmp(where, "unix:", 5)) {
        s->in_fd = s->out_fd = connect_to("--serial", where + 5);
        return s->out_fd < 0 ? -1 : 0;
    }
    if (strncmp(where, "file:", 5))
        return complain("--serial %s is none of stdio, null, file:PATH and unix:PATH", where);
    s->out_fd = open(where + 5, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (s->out_fd < 0)
        return complain("--serial: cannot open %s: %s", where + 5, strerror(errno));
    return 0;
}

static bool ready(int fd, short events)
{
    struct pollfd p = {.fd = fd, .events = events};
    return fd >= 0 && poll(&p, 1, 0) > 0 && p.revents;
}

/* Give the peer what it takes. Nobody there: what the guest says is lost, and the guest runs on. */
static void flush(struct serial *s)
{
    struct serial_state *t = &s->state;
    ssize_t n = t->n_out;
    if (n && s->out_fd >= 0) {
        if (!ready(s->out_fd, POLLOUT))
            return;
        n = write(s->out_fd, t->out, t->n_out);
        if (n < 0 && errno != EINTR && errno != EAGAIN) {
            s->out_fd = -1;
            n = t->n_out;
        }
    }
    if (n > 0) {
        t->n_out = (uint8_t)(t->n_out - n);
        memmove(t->out, t->out + n, t->n_out);
    }
}

static void fill(struct serial *s)
{
    if (s->state.n_in || !ready(s->in_fd, POLLIN))
        return;
    ssize_t n = read(s->in_fd, s->state.in, SERIAL_FIFO);
    if (n > 0)
        s->state.n_in = (uint8_t)n;
    else if (n == 0 || (errno != EINTR && errno != EAGAIN))
        s->in_fd = -1;
}

/* ---- Registers ---- */

static uint8_t take_byte(struct serial_state *t)
{
    uint8_t byte = t->in[0];
    if (!t->n_in)
        return 0;
    t->n_in--;
    memmove(t->in, t->in + 1, t->n_in);
    return byte;
}

static uint8_t line_status(struct serial *s)
{
    fill(s);
    flush(s);
    return (uint8_t)((s->state.n_in ? STATUS_RECEIVED : 0) |
                     (s->state.n_out <= SERIAL_FIFO - 16 ? STATUS_ROOM : 0));
}

static uint8_t read_register(struct serial *s, unsigned reg)
{
    struct serial_state *t = &s->state;
    bool divisor = t->line & LINE_DIVISOR;
    switch (reg) {
    case DATA:
        return divisor ? t->divisor[0] : take_byte(t);
    case INTERRUPTS:
        return divisor ? t->divisor[1] : t->interrupts;
    case IDENTITY:
        return 0xc1; /* FIFOs, no interrupt */
    case LINE:
        return t->line;
    case MODEM:
        return t->modem;
    case LINE_STATUS:
        return line_status(s);
    case MODEM_STATUS:
        return 0xb0;
    default:
        return t->scratch;
    }
}

/* A guest that does not ask for room loses what does not fit. */
static void put_byte(struct serial *s, uint8_t byte)
{
    struct serial_state *t = &s->state;
    if (t->n_out < SERIAL_FIFO)
        t->out[t->n_out++] = byte;
    if (byte == '\n' || t->n_out >= SERIAL_FIFO - 16)
        flush(s);
}

static void write_register(struct serial *s, unsigned reg, uint8_t value)
{
    struct serial_state *t = &s->state;
    bool divisor = t->line & LINE_DIVISOR;
    switch (reg) {
    case DATA:
        if (divisor)
            t->divisor[0] = value;
        else
            put_byte(s, value);
        break;
    case INTERRUPTS:
        if (divisor)
            t->divisor[1] = value;
        else
            t->interrupts = value & 0x0f;
        break;
    case LINE:
        t->line = value;
        break;
    case MODEM:
        t->modem = value;
        break;
    case SCRATCH:
        t->scratch = value;
        break;
    default:
        break;
    }
}

void serial_read(struct serial *s, unsigned port, uint8_t *ret_value)
{
    pthread_mutex_lock(&s->lock);
    *ret_value = read_register(s, port - SERIAL_PORT);
    pthread_mutex_unlock(&s->lock);
}

void serial_write(struct serial *s, unsigned port, uint8_t value)
{
    pthread_mutex_lock(&s->lock);
    write_register(s, port - SERIAL_PORT, value);
    pthread_mutex_unlock(&s->lock);
}

/* ---- State ---- */

void serial_save(struct serial *s, struct state *state)
{
    pthread_mutex_lock(&s->lock);
    flush(s);
    state_put(state, STATE_SERIAL, 0, &s->state, sizeof(s->state));
    pthread_mutex_unlock(&s->lock);
}

int serial_load(struct serial *s, const struct state *state)
{
    struct serial_state t;
    if (state_copy(state, STATE_SERIAL, 0, &t, sizeof(t)) < 0)
        return -1;
    if (t.n_in > SERIAL_FIFO || t.n_out > SERIAL_FIFO)
        return complain("the guest's state is damaged: the console's buffers");
    pthread_mutex_lock(&s->lock);
    s->state = t;
    pthread_mutex_unlock(&s->lock);
    return 0;
}
