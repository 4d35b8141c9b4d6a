/* SPDX-License-Identifier: Apache-2.0 */
#include "client/client.h"
#include "tools/cli_repo.h"

#include "repo/repo.h"
#include "repo/source.h"

#include <stdlib.h>
#include <unistd.h>

static Vmmig__Control__Repo request(const struct cli *c, Vmmig__Control__RepoVerb verb)
{
    Vmmig__Control__Repo m = VMMIG__CONTROL__REPO__INIT;
    m.verb = verb;
    m.file = client_word(c->file ? c->file : "");
    m.parent = client_word(c->parent ? c->parent : "");
    return m;
}

static int run_import(const struct cli *c, struct vm_error **err)
{
    Vmmig__Control__Repo m = request(c, VMMIG__CONTROL__REPO_VERB__IMAGE_IMPORT);
    cleanup_close int fd = -1;
    m.path = client_word(c->args.list[0]);
    m.image = client_word(c->args.list[1]);
    if (image_name_check(m.image, err) < 0 || source_prepare(m.path, c->format, &fd, err) < 0)
        return -1;
    return cli_repo_run(c, &m, fd, err);
}

static int run_export(const struct cli *c, struct vm_error **err)
{
    Vmmig__Control__Repo m = request(c, VMMIG__CONTROL__REPO_VERB__IMAGE_EXPORT);
    cleanup_close int fd = -1;
    m.image = client_word(c->args.list[0]);
    m.path = client_word(c->args.list[1]);
    if (image_name_check(m.image, err) < 0 || image_export_target(m.path, &fd, err) < 0)
        return -1;
    int result = cli_repo_run(c, &m, fd, err);
    if (result)
        image_export_undo(m.path, fd);
    return result;
}

static int run_list(const struct cli *c, struct vm_error **err)
{
    Vmmig__Control__Repo m = request(c, VMMIG__CONTROL__REPO_VERB__IMAGE_LIST);
    return cli_repo_run(c, &m, -1, err);
}

static int run_of_image(const struct cli *c, Vmmig__Control__RepoVerb verb, struct vm_error **err)
{
    Vmmig__Control__Repo m = request(c, verb);
    /* What is deleted may be an entry whose very name is damaged. */
    bool any = verb == VMMIG__CONTROL__REPO_VERB__IMAGE_DELETE;
    m.image = client_word(c->args.list[0]);
    m.other = client_word(c->args.n > 1 ? c->args.list[1] : "");
    if ((!any && image_name_check(m.image, err) < 0) ||
        (*m.other && image_name_check(m.other, err) < 0))
        return -1;
    return cli_repo_run(c, &m, -1, err);
}

static int run_show(const struct cli *c, struct vm_error **err)
{
    return run_of_image(c, VMMIG__CONTROL__REPO_VERB__IMAGE_SHOW, err);
}

static int run_delete(const struct cli *c, struct vm_error **err)
{
    return run_of_image(c, VMMIG__CONTROL__REPO_VERB__IMAGE_DELETE, err);
}

static int run_diff(const struct cli *c, struct vm_error **err)
{
    return run_of_image(c, VMMIG__CONTROL__REPO_VERB__IMAGE_DIFF, err);
}

#define MEMBER(m) .offset = offsetof(struct cli, m)
#define REPO_OPTION                                                                                \
    {"repo", "URL", option_parse_text, MEMBER(repo),                                               \
     .text = "Open this repository here, without an agent (see `vmmig repo init --help`)"}

static const struct option image_options[] = {REPO_OPTION, {NULL}};

static const struct option import_options[] = {
    REPO_OPTION,
    {"format", "FORMAT", option_parse_text, MEMBER(format),
     .text = "Of the file: raw, qcow2 or another that qemu-img knows, instead of looking. An image "
             "that builds upon other files is read only if its format is given"},
    {"parent", "IMAGE", option_parse_text, MEMBER(parent),
     .text = "The image whose later version this is"},
    {"file", "NAME", option_parse_text, MEMBER(file),
     .text = "What the file is called within the image; disk0.raw if it is not given"},
    {NULL}};

static const struct option export_options[] = {
    REPO_OPTION,
    {"file", "NAME", option_parse_text, MEMBER(file),
     .text = "Which file of the image; its only one or disk0.raw if it is not given"},
    {NULL}};

#undef MEMBER

static const struct cli_command commands[] = {
    {"image import", "FILE NAME", 2, 2, false, import_options, "put a disk image into the repository",
     "Store a disk image under a name: a raw file, a block device, or any format that qemu-img "
     "reads. What the repository holds already is not stored again; holes and zeros take nothing. "
     "Either the whole image is there afterwards, or nothing.\n\n"
     "The file is opened with your rights, also when the agent reads it.\n\n"
     "    vmmig image import debian12.qcow2 debian12",
     run_import},
    {"image export", "NAME FILE", 2, 2, false, export_options, "get a disk image out, as a raw file",
     "Write an image as a raw file with holes, which must not exist, or onto a block device. The "
     "file appears once it is whole.\n\n"
     "    vmmig image export debian12 /tmp/debian12.raw",
     run_export},
    {"image list", "", 0, 0, false, image_options, "the images of the repository",
     "List the images: when they were made, their size, and what each added to the repository. "
     "Where entries of the catalogue are damaged the others are listed, it says so, and the exit status is "
     "12.",
     run_list},
    {"image show", "NAME", 1, 1, false, image_options, "what an image takes, and with whom it shares",
     "Tell about an image: its files, what it takes in the repository, how much of that is its "
     "alone, and which images use the rest, too. Reads the recipes of all images.",
     run_show},
    {"image delete", "NAME", 1, 1, false, image_options, "remove an image",
     "Remove an image. Its space is freed by the next `vmmig repo gc`. Also an entry of the "
     "catalogue that is damaged, by the name that `vmmig repo scrub` tells of it.",
     run_delete},
    {"image diff", "A B", 2, 2, false, image_options, "where two images differ",
     "List the stretches in which two images differ: file, offset and length in bytes. No data is "
     "read.",
     run_diff},
    {NULL}};

static const struct cli_object objects[] = {
    {"an image (image list: an array `images`)",
     "image, parent, created, size, bytes_added, files (name, size)"},
    {"image show",
     "those of an image, and virtual_bytes, data_bytes, stored_bytes, shared_bytes, unique_bytes, "
     "recipe_bytes, estimated, unreadable, shared_with, sharers (image, bytes)"},
    {"image import",
     "image, size, zero_bytes, shared_bytes, new_bytes, again_bytes (stored once more to keep "
     "reading cheap), stored_bytes, elapsed_ms"},
    {"image export", "image, path, elapsed_ms"},
    {"image delete", "image, deleted"},
    {"image diff", "differences (file, offset, len), differing_bytes"},
    {NULL}};

const struct cli_family cli_family_image = {"Images", commands, objects};
